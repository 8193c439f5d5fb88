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
