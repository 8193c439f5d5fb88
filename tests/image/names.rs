//! Names in images, and images that are read although something is wrong with them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;

use super::*;
use crate::support::{Negotiation, refusal};

/// Serves an image with these arguments and reads its start.
fn first_byte(image: &Path, args: &[&str]) -> (u8, String) {
    let server = Server::serve(&[&[text(image)][..], args].concat());
    let byte = server.client(ReplyStyle::Structured).read(0, 1)[0];
    let log = server.log();
    server.stop();
    (byte, log)
}

#[test]
fn a_data_file_is_written_where_the_user_says_so() {
    if !has_qemu_img("a_data_file_is_written_where_the_user_says_so") {
        return;
    }
    let place = Place::new();
    let (image, data) = (place.path("disk.qcow2"), place.path("neighbour.img"));
    let options = format!("data_file={},data_file_raw=on,preallocation=metadata", text(&data));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&image), "1M"]);
    fs::write(&data, [9; 1 << 20]).unwrap();
    let line = refusal(&[text(&image)]);
    assert!(line.contains("neighbour.img") && line.contains("--data-file"), "{line}");
    let other = place.file("other.img", &[0; 1 << 20]);
    assert!(refusal(&[text(&image), "--data-file", text(&other)]).contains("--data-file"));
    assert!(refusal(&[text(&image), "--data-file", text(&place.path("missing"))]).contains("--data-file"));
    for args in [&["-r"][..], &["-s"]] {
        assert_eq!(first_byte(&image, args).0, 9, "{args:?}");
    }
    let info = Command::new(support::PROGRAM).args(["info", text(&image)]).output().unwrap();
    assert!(
        info.status.success() && String::from_utf8_lossy(&info.stdout).contains("neighbour.img"),
        "{info:?}"
    );
    for (n, args) in [&["--allow-backing", "any"][..], &["--data-file", text(&data)]].into_iter().enumerate()
    {
        let byte = u8::try_from(n).unwrap();
        let server = Server::serve(&[&[text(&image)][..], args].concat());
        server.client(ReplyStyle::Structured).write(0, &[byte; 4096]);
        server.stop();
        assert_eq!(fs::read(&data).unwrap()[..4096], [byte; 4096]);
    }
    // One elsewhere that was named by the user is as good.
    let elsewhere = Place::new();
    let far = elsewhere.path("far.img");
    fs::rename(&data, &far).unwrap();
    symlink(&far, &data).unwrap();
    assert!(refusal(&[text(&image)]).contains("--data-file"));
    assert!(refusal(&[text(&image), "-r"]).contains("--allow-backing any"));
    assert_eq!(first_byte(&image, &["--data-file", text(&far)]).0, 1);
}

#[test]
fn marked_images_are_read_with_a_warning() {
    if !has_qemu_img("marked_images_are_read_with_a_warning") {
        return;
    }
    let place = Place::new();
    let (raw, image, top) =
        (place.file("raw", &[5; 1 << 20]), place.path("disk.qcow2"), place.path("top.qcow2"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", text(&top)]);
    let whole = fs::read(&image).unwrap();
    for (mark, word) in [(1, "dirty"), (2, "corrupt"), (3, "corrupt")] {
        let mut bytes = whole.clone();
        bytes[79] |= mark;
        fs::write(&image, &bytes).unwrap();
        for args in [&["-r"][..], &["-s"]] {
            let (byte, log) = first_byte(&image, args);
            assert!(byte == 5 && log.contains(word) && log.contains("check -r all"), "{args:?}: {log}");
        }
        let line = refusal(&[text(&image)]);
        assert!(line.contains(word) && line.contains("--read-only"), "{line}");
        let (byte, log) = first_byte(&top, &[]);
        assert!(byte == 5 && log.contains(word), "a backing image is only read: {log}");
        assert!(fs::read(&image).unwrap() == bytes, "the marks stay");
    }
}

#[test]
fn sizes_that_are_no_multiple_of_a_sector() {
    if !has_qemu_img("sizes_that_are_no_multiple_of_a_sector") {
        return;
    }
    let mut random = Random::new(0x5eed_500c);
    for cluster in ["512", "4096", "65536"] {
        let place = Place::new();
        let size = SIZE - 1234 - 71;
        let mut model = content(&mut random);
        let (raw, image) = (place.file("first.raw", &model), place.path("disk.qcow2"));
        let options = format!("cluster_size={cluster}");
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&image)]);
        let mut bytes = fs::read(&image).unwrap();
        bytes[24..32].copy_from_slice(&(size as u64).to_be_bytes());
        fs::write(&image, bytes).unwrap();
        model.truncate(size);
        let server = Server::serve(&[text(&image)]);
        let mut client = server.client(ReplyStyle::Structured);
        assert_eq!(client.size, size as u64);
        for (at, len) in [(size - 1, 1), (size - 700, 700), (size - 70_000, 70_000), (size - 513, 100)] {
            let data = random.bytes(len);
            client.write(at as u64, &data);
            model[at..at + len].copy_from_slice(&data);
        }
        client.call(Nbd::WriteZeroes, NO_FLAGS, size as u64 - 300, 300);
        model[size - 300..].fill(0);
        assert!(client.read(0, size as u64) == model);
        let answer = client.call(Nbd::Read, NO_FLAGS, size as u64 - 1, 2);
        assert!(answer.error.is_some(), "nothing lies past the end");
        client.flush();
        client.disconnect();
        server.stop();
        check(&image);
        let server = Server::serve(&[text(&image), "-r"]);
        assert!(server.client(ReplyStyle::Structured).read(0, size as u64) == model);
    }
}

#[test]
fn a_link_to_an_image_has_the_backing_file_of_its_target() {
    if !has_qemu_img("a_link_to_an_image_has_the_backing_file_of_its_target") {
        return;
    }
    let (place, elsewhere) = (Place::new(), Place::new());
    place.file("base.raw", &[3; 1 << 20]);
    let image = place.path("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", text(&image)]);
    let link = elsewhere.path("link.qcow2");
    symlink(&image, &link).unwrap();
    assert_eq!(first_byte(&link, &[]).0, 3);
    // What lies beside the link comes first, as qemu has it, and is out of the folder.
    elsewhere.file("base.raw", &[4; 1 << 20]);
    assert!(refusal(&[text(&link)]).contains("--allow-backing any"));
    assert_eq!(first_byte(&link, &["--allow-backing", "any"]).0, 4);
}

#[test]
fn backing_names_as_libvirt_writes_them() {
    if !has_qemu_img("backing_names_as_libvirt_writes_them") {
        return;
    }
    let place = Place::new();
    let raw = place.file("base.raw", &[3; 1 << 20]);
    let base = place.path("base.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&base)]);
    let named = |name: &str, format: &str| {
        let image = place.path("top.qcow2");
        let _ = fs::remove_file(&image);
        qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", format, text(&image), "1M"]);
        image
    };
    for name in [
        format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}}}}"#, text(&base)),
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}"#.into(),
        r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"base.qcow2"}"#.into(),
        r#"json:{"driver":"file","filename":"base.qcow2"}"#.into(),
    ] {
        assert_eq!(first_byte(&named(&name, "qcow2"), &[]).0, 3, "{name}");
    }
    let name = r#"json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}"#;
    assert_eq!(first_byte(&named(name, "raw"), &[]).0, 3);
    let name = r#"json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"base.raw"}}"#;
    assert!(refusal(&[text(&named(name, "raw"))]).contains("`offset`"));
    let name = r#"json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}"#;
    assert!(refusal(&[text(&named(name, "raw"))]).contains("--allow-backing any"));
}

/// Descriptors in each product's words: what they lead to, and where an extent's file ends early.
#[test]
fn vmdk_descriptors_of_each_product() {
    let place = Place::new();
    let mut content = vec![1; 2048 * 512];
    content[1024 * 512..].fill(2);
    place.file("disk-flat.vmdk", &content);
    let extents = [
        ("vmware esxi", "vmfs", "RW 2048 VMFS \"disk-flat.vmdk\"\n"),
        ("esxi raw device", "vmfsPassthroughRawDeviceMap", "RW 2048 VMFSRDM \"disk-flat.vmdk\"\n"),
        ("workstation", "monolithicFlat", "RW 2048 FLAT \"disk-flat.vmdk\" 0\n"),
        (
            "workstation, split",
            "twoGbMaxExtentFlat",
            "RW 1024 FLAT \"disk-flat.vmdk\" 0\nRW 1024 FLAT \"disk-flat.vmdk\" 1024\n",
        ),
        ("virtualbox", "fullDevice", "rw 2048 flat \"disk-flat.vmdk\" 0\r\n"),
        ("short", "monolithicFlat", "RW 3000 FLAT \"disk-flat.vmdk\" 0\n"),
    ];
    for (product, kind, lines) in extents {
        let text_of = format!(
            "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=fffffffe\nparentCID=ffffffff\n\
             isNativeSnapshot=\"no\"\ncreateType=\"{kind}\"\n\n# Extent description\n{lines}\n\
             # Change Tracking File\nchangeTrackPath=\"disk-ctk.vmdk\"\n\n# The Disk Data Base \n#DDB\n\n\
             ddb.adapterType = \"lsilogic\"\nddb.geometry.cylinders = \"2\"\nddb.uuid = \"60 00\"\n"
        );
        let vmdk = place.file("disk.vmdk", text_of.as_bytes());
        let server = Server::serve(&[text(&vmdk), "-r"]);
        let mut client = server.client(ReplyStyle::Structured);
        let told = usize::try_from(client.size).unwrap();
        let mut model = content.clone();
        model.resize(told, 0);
        assert!(client.read(0, told as u64) == model, "{product}");
        client.disconnect();
        let log = server.log();
        assert!(!log.contains("repairs it"), "{log}");
        if product == "short" {
            assert_eq!(told, 3000 * 512);
            assert!(log.contains("read as zeroes"), "{log}");
        }
        server.stop();
    }
    // A file that ends within a sector.
    place.file("odd.vmdk.raw", &[8; 1000]);
    let vmdk = place.file(
        "odd.vmdk",
        b"# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\nRW 4 FLAT \"odd.vmdk.raw\" 0\n",
    );
    let server = Server::serve(&[text(&vmdk), "-r"]);
    let read = Negotiation::begin(server.stream()).enter(ReplyStyle::Structured, "").read(0, 2048);
    assert!(read[..1000] == [8; 1000] && read[1000..] == [0; 1048]);
}

/// Names are bytes to the system: an image over such a file is made, described, read and written.
#[test]
fn names_that_are_not_utf_8() {
    let place = Place::new();
    let folder = place.path("");
    let base = folder.join(OsStr::from_bytes(b"b\xff\nase"));
    fs::write(&base, [0x42; 1 << 20]).unwrap();
    let run = |words: &[&OsStr]| {
        let output = Command::new(support::PROGRAM).args(words).current_dir(&folder).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let create = ["create", "-f", "qcow2", "-F", "raw", "-b"].map(OsStr::new);
    run(&[&create[..], &[base.file_name().unwrap(), "top.qcow2".as_ref()]].concat());
    let told = run(&["info".as_ref(), "top.qcow2".as_ref()]);
    assert!(told.contains("ase (raw)") && !told.contains("problem"), "{told}");
    let image = place.path("top.qcow2");
    for byte in 1..4 {
        let server = Server::serve(&[text(&image)]);
        let mut client = server.client(ReplyStyle::Structured);
        assert_eq!(client.read(4096, 1), [if byte == 1 { 0x42 } else { byte - 1 }]);
        client.write(4096, &[byte; 4096]);
        assert_eq!(client.read(0, 1), [0x42]);
        client.disconnect();
        server.stop();
        let bytes = fs::read(&image).unwrap();
        assert!(bytes.windows(6).any(|name| name == b"b\xff\nase"), "the name has changed");
    }
}

/// A sparse vmdk image is refused for what it is, also where it would be written.
#[test]
fn advice_about_vmdk_images_is_true() {
    if !has_qemu_img("advice_about_vmdk_images_is_true") {
        return;
    }
    let place = Place::new();
    let image = place.path("sparse.vmdk");
    qemu_img(&["create", "-q", "-f", "vmdk", text(&image), "1M"]);
    for args in [&[text(&image)][..], &[text(&image), "-r"]] {
        let line = refusal(args);
        assert!(line.contains("sparse") && !line.contains("--read-only"), "{line}");
    }
}
