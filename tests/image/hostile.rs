//! Images that are broken, or made to harm: one line each, and a server that lives.

use super::*;

/// The line with which an image is refused.
fn refusal(args: &[&str]) -> String {
    let log = Server::try_serve(args).err().unwrap_or_else(|| panic!("{args:?} was served"));
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.starts_with("nbdbridge: "), "{log}");
    log
}

fn new_image(place: &Place, name: &str, options: &[&str]) -> PathBuf {
    let image = place.path(name);
    qemu_img(&[&["create", "-q", "-f", "qcow2"], options, &[text(&image), "4M"]].concat());
    image
}

#[test]
fn features_that_are_not_served_are_named_with_the_way_out() {
    if !has_qemu_img("features_that_are_not_served_are_named_with_the_way_out") {
        return;
    }
    let place = Place::new();
    let secret = [
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    ];
    for (options, word) in [
        (&["-o", "compression_type=zstd"][..], "zstd"),
        (&["-o", "extended_l2=on"], "extended L2"),
        (&secret, "encrypted"),
    ] {
        let image = new_image(&place, "feature.qcow2", options);
        let log = refusal(&[text(&image)]);
        assert!(log.contains(word) && log.contains("qemu-img convert"), "{log}");
        fs::remove_file(&image).unwrap();
    }
    for (bit, word) in [(1_u8, "dirty"), (2, "corrupt")] {
        let image = new_image(&place, "bit.qcow2", &[]);
        let mut bytes = fs::read(&image).unwrap();
        bytes[79] |= bit;
        fs::write(&image, bytes).unwrap();
        let log = refusal(&[text(&image)]);
        assert!(log.contains(word) && log.contains("qemu-img check -r all"), "{log}");
    }
    for format in ["vdi", "vhdx", "vpc", "qed", "parallels"] {
        let image = place.path("foreign");
        qemu_img(&["create", "-q", "-f", format, text(&image), "4M"]);
        let log = refusal(&[text(&image)]);
        assert!(log.contains(format) && log.contains("qemu-img convert"), "{log}");
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn names_in_images_are_not_followed_anywhere() {
    if !has_qemu_img("names_in_images_are_not_followed_anywhere") {
        return;
    }
    let (place, elsewhere) = (Place::new(), Place::new());
    let secret = elsewhere.file("secret", &[7; 1 << 20]);
    let named = |name: &str| {
        let image = place.path("named.qcow2");
        let _ = fs::remove_file(&image);
        qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", text(&image), "1M"]);
        image
    };
    let image = named(text(&secret));
    assert!(refusal(&[text(&image)]).contains("--allow-backing any"));
    let server = Server::serve(&[text(&image), "--allow-backing", "any"]);
    assert_eq!(server.client(ReplyStyle::Structured).read(0, 4), [7; 4]);
    server.stop();
    // A link within the folder leads out of it all the same.
    std::os::unix::fs::symlink(&secret, place.path("link")).unwrap();
    assert!(refusal(&[text(&named("link"))]).contains("--allow-backing any"));
    assert!(refusal(&[text(&named("../there is no such file"))]).contains("does not exist"));
    for name in ["json:{\"driver\":\"null-co\"}", "nbd://localhost/x", "https://example.org/x"] {
        assert!(refusal(&[text(&named(name))]).contains("only paths"), "{name}");
    }
    assert!(refusal(&[text(&named("named.qcow2"))]).contains("loop"));
    // A longer one, through a data file's name as well.
    let (a, b) = (place.path("a.qcow2"), place.path("b.qcow2"));
    qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", text(&a), "1M"]);
    qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", text(&b), "1M"]);
    assert!(refusal(&[text(&a)]).contains("loop"));
    // A backing image is refused for what it is, too.
    new_image(&place, "zstd.qcow2", &["-o", "compression_type=zstd"]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "zstd.qcow2",
        "-F",
        "qcow2",
        text(&place.path("over.qcow2")),
    ]);
    assert!(refusal(&[text(&place.path("over.qcow2"))]).contains("zstd"));
    // An extent outside of the folder.
    let vmdk = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"{}\" 0\n",
        text(&secret)
    );
    let vmdk = place.file("disk.vmdk", vmdk.as_bytes());
    assert!(refusal(&[text(&vmdk), "-r"]).contains("--allow-backing any"));
    let server = Server::serve(&[text(&vmdk), "-r", "--allow-backing", "any"]);
    assert_eq!(server.client(ReplyStyle::Structured).read(0, 4), [7; 4]);
}

/// Images cut off anywhere, and with absurd numbers in the header: refused or served, never a crash.
#[test]
fn cut_off_and_absurd_images_do_no_harm() {
    if !has_qemu_img("cut_off_and_absurd_images_do_no_harm") {
        return;
    }
    let mut random = Random::new(0x5eed_5007);
    let place = Place::new();
    let model = content(&mut random);
    let (raw, image) = (place.file("first.raw", &model), place.path("disk.qcow2"));
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-c",
        "-o",
        "cluster_size=4096",
        text(&raw),
        text(&image),
    ]);
    let whole = fs::read(&image).unwrap();
    for len in [4, 71, 72, 103, 104, 112, 4096, 8192, 12288, 16384, 100_000] {
        println!("cut off at {len}");
        try_it(&place, &whole[..len], &mut random);
    }
    for field in (4..104).step_by(4) {
        for value in [0, 1, 0x7fff_ffff, u32::MAX] {
            let mut bytes = whole.clone();
            bytes[field..field + 4].copy_from_slice(&value.to_be_bytes());
            if random.below(3) == 0 {
                println!("{value:#x} at {field}");
                try_it(&place, &bytes, &mut random);
            }
        }
    }
}

/// Numbers changed at random where the tables are.
#[test]
fn broken_tables_cost_requests_and_not_the_server() {
    if !has_qemu_img("broken_tables_cost_requests_and_not_the_server") {
        return;
    }
    let mut random = Random::new(0x5eed_5008);
    let place = Place::new();
    let model = content(&mut random);
    let (raw, image) = (place.file("first.raw", &model), place.path("disk.qcow2"));
    for compress in [&[][..], &["-c"]] {
        let options =
            [&["convert", "-f", "raw", "-O", "qcow2"], compress, &["-o", "cluster_size=4096"]].concat();
        qemu_img(&[&options[..], &[text(&raw), text(&image)]].concat());
        let whole = fs::read(&image).unwrap();
        for _ in 0..12 {
            let mut bytes = whole.clone();
            // The first clusters: header, refcount table, refcounts, L1 and L2 tables.
            for _ in 0..1 + random.index(60) {
                let at = 112 + random.index(60_000);
                bytes[at] ^= random.bytes(1)[0];
            }
            try_it(&place, &bytes, &mut random);
        }
    }
}

/// Serves an image, if it is served, and asks for this and that. Any answer will do.
fn try_it(place: &Place, bytes: &[u8], random: &mut Random) {
    let path = place.file("broken.qcow2", bytes);
    let server = match Server::try_serve(&[text(&path), "-f", "qcow2"]) {
        Ok(server) => server,
        Err(log) => return assert_eq!(log.lines().count(), 1, "{log}"),
    };
    assert!(server.resident() < 300 << 20);
    let mut client = server.client(ReplyStyle::Structured);
    let size = SIZE as u64;
    for at in (0..size).step_by(512 << 10) {
        client.call(Nbd::Read, NO_FLAGS, at, 4096);
        let offset = at + random.below(400_000);
        client.call(Nbd::BlockStatus, NO_FLAGS, at, 512 << 10);
        match random.below(4) {
            0 => drop(client.call(Nbd::WriteZeroes, NO_FLAGS, offset, 50_000)),
            1 => drop(client.call(Nbd::Trim, NO_FLAGS, offset, 50_000)),
            _ => drop(client.call_write(NO_FLAGS, offset, &[9; 5000])),
        }
    }
    client.call(Nbd::Flush, NO_FLAGS, 0, 0);
    client.disconnect();
    assert!(server.resident() < 300 << 20);
    drop(server);
}

#[test]
fn a_probed_image_stays_what_it_is() {
    let place = Place::new();
    let image = place.file("disk.img", &[0; 8192]);
    let mut header = vec![0; 4096];
    header[..4].copy_from_slice(b"QFI\xfb");
    let server = Server::serve(&[text(&image)]);
    let mut client = server.client(ReplyStyle::Structured);
    let answer = client.call_write(NO_FLAGS, 0, &header);
    assert_eq!(answer.error, Some(nbd_proto::NbdError::Perm));
    client.write(4096, &header);
    client.disconnect();
    assert!(server.log().contains("-f raw"), "{}", server.log());
    server.stop();
    assert!(fs::read(&image).unwrap()[..4096] == [0; 4096]);
    let server = Server::serve(&[text(&image), "-f", "raw"]);
    server.client(ReplyStyle::Structured).write(0, &header);
    server.stop();
}
