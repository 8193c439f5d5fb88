//! What is told of a chain without reading it: depth and block status, beside what qemu tells.

use serde_json::Value;

use super::*;
use support::{eventually, lacks, run};

const MIB: u64 = 1 << 20;

/// A chain with every kind of cluster: a sparse raw base, shorter than the rest, a middle image and a top.
fn chain(place: &Place, cluster: &str) -> PathBuf {
    let base = place.path("base.raw");
    let file = fs::File::create(&base).unwrap();
    for n in [0, 2, 3, 6] {
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 1 << 20], n * MIB).unwrap();
    }
    file.set_len(9 * MIB).unwrap();
    let (middle, top) = (place.path("middle.qcow2"), place.path("top.qcow2"));
    let options = ["-o", cluster];
    let create = |image: &Path, below: &str, format: &str, size: &str| {
        let args =
            [&["create", "-q", "-f", "qcow2", "-b", below, "-F", format][..], &options, &[text(image), size]];
        qemu_img(&args.concat());
    };
    create(&middle, "base.raw", "raw", "11M");
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 1M 256k", "-c", "write -z 2M 512k", text(&middle)]);
    create(&top, "middle.qcow2", "qcow2", "12M");
    let commands = ["write -P 3 512k 64k", "write -z 3M 128k", "write -P 3 8900k 200k", "discard 1M 64k"];
    let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", *command]).collect();
    run("qemu-io", &[&["-f", "qcow2"][..], &commands, &[text(&top)]].concat());
    top
}

/// The runs of a JSON list: start, length, and what `tell` finds in each. Neighbours that agree are one.
fn runs<T: PartialEq>(json: &str, start: &str, tell: impl Fn(&Value) -> T) -> Vec<(u64, u64, T)> {
    let list: Vec<Value> = serde_json::from_str(json).unwrap();
    let mut runs: Vec<(u64, u64, T)> = Vec::new();
    for run in &list {
        let (start, len, told) = (run[start].as_u64().unwrap(), run["length"].as_u64().unwrap(), tell(run));
        match runs.last_mut() {
            Some(last) if last.2 == told => last.1 += len,
            _ => runs.push((start, len, told)),
        }
    }
    runs
}

#[test]
fn the_depth_of_a_chain_is_what_qemu_nbd_tells() {
    if lacks("the_depth_of_a_chain_is_what_qemu_nbd_tells", &["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"]) {
        return;
    }
    for cluster in ["cluster_size=65536", "cluster_size=4096"] {
        let place = Place::new();
        let top = chain(&place, cluster);
        let alone = place.path("alone.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", text(&alone), "4M"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write 1M 1M", "-c", "write -z 3M 64k", text(&alone)]);
        for (image, levels) in [(top, &[1, 2, 3][..]), (alone, &[0, 1])] {
            let server = Server::serve(&[text(&image), "-A", "-r"]);
            let socket = place.path("qemu.sock");
            let mut qemu = Command::new("qemu-nbd");
            qemu.args(["-A", "-r", "-t", "-k", text(&socket), "-f", "qcow2", text(&image)]);
            let mut qemu = qemu.spawn().unwrap();
            eventually("qemu-nbd listens", || socket.exists());
            let map = |uri: &str| {
                let json = run("nbdinfo", &["--map=qemu:allocation-depth", "--json", uri]);
                runs(&json, "offset", |run| run["type"].as_u64().unwrap())
            };
            let (ours, theirs) =
                (map(&server.uri("")), map(&format!("nbd+unix:///?socket={}", text(&socket))));
            qemu.kill().unwrap();
            qemu.wait().unwrap();
            fs::remove_file(&socket).unwrap();
            assert_eq!(ours, theirs, "{}", image.display());
            assert!(levels.iter().all(|level| ours.iter().any(|run| run.2 == *level)), "{ours:?}");
            server.stop();
        }
    }
}

#[test]
fn holes_beneath_a_chain_are_what_qemu_img_maps() {
    if lacks("holes_beneath_a_chain_are_what_qemu_img_maps", &["qemu-img", "qemu-io", "nbdinfo"]) {
        return;
    }
    // Where files have holes.
    let place = Place(tempfile::tempdir_in("/var/tmp").unwrap());
    let reserved = place.path("reserved.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", text(&reserved), "12M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write 1M 1M", text(&reserved)]);
    for image in [chain(&place, "cluster_size=65536"), reserved] {
        let json = qemu_img(&["map", "--output=json", "-f", "qcow2", text(&image)]);
        let theirs = runs(&json, "start", |run| run["zero"].as_bool().unwrap());
        let server = Server::serve(&[text(&image), "-r"]);
        let json = run("nbdinfo", &["--map", "--json", &server.uri("")]);
        let ours = runs(&json, "offset", |run| run["type"].as_u64().unwrap() & 2 != 0);
        assert_eq!(ours, theirs, "{}", image.display());
        assert!(ours.len() > 2, "{ours:?}");
        server.stop();
    }
}

#[test]
fn one_damaged_entry_leaves_the_status_before_it() {
    if lacks("one_damaged_entry_leaves_the_status_before_it", &["qemu-img"]) {
        return;
    }
    let place = Place::new();
    let (raw, image) = (place.file("first.raw", &[7; 4 << 20]), place.path("disk.qcow2"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
    let whole = fs::read(&image).unwrap();
    let number = |at: usize| {
        usize::try_from(u64::from_be_bytes(*whole[at..].first_chunk().unwrap()) & 0xff_ffff_ffff).unwrap()
    };
    let table = number(number(40));
    // An entry past the end of the file, and one that leads to the refcount table.
    for bad in [(1_u64 << 63) | (1 << 40), (1 << 63) | 0x1_0000] {
        for entry in [20, 1, 0] {
            let mut bytes = whole.clone();
            bytes[table + 8 * entry..][..8].copy_from_slice(&bad.to_be_bytes());
            fs::write(&image, bytes).unwrap();
            // Where an image is only read, an entry that leads to a table does no harm.
            let read_only = (bad == (1 << 63) | (1 << 40)).then_some(&["-r"][..]);
            for more in read_only.into_iter().chain([&[][..]]) {
                let server = Server::serve(&[&[text(&image), "-A"][..], more].concat());
                for context in ["base:allocation", "qemu:allocation-depth"] {
                    let mut negotiation = server.negotiate();
                    assert!(negotiation.settle(ReplyStyle::Structured));
                    negotiation
                        .option(nbd_proto::OptionCode::SetMetaContext, &support::meta_data("", &[context]));
                    let mut client = negotiation.go(ReplyStyle::Structured, "");
                    let answer = client.call(Nbd::BlockStatus, NO_FLAGS, 0, 4 << 20);
                    let told: u64 = answer.extents.iter().map(|(len, _)| len).sum();
                    let what = format!("{bad:#x} in {entry}, {context}: {answer:?}");
                    match entry {
                        0 if context.starts_with("base") => assert!(answer.error.is_some(), "{what}"),
                        0 => {}
                        _ => assert!(answer.error.is_none() && told >= entry as u64 * 65536, "{what}"),
                    }
                    // Behind it all is well.
                    let answer = client.call(Nbd::BlockStatus, NO_FLAGS, 21 * 65536, 65536);
                    assert_eq!(answer.error, None, "{what}");
                }
                server.stop();
            }
        }
    }
}
