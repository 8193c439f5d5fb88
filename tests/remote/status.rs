//! Block status through a proxy: the extents that the server tells, whatever their kinds and lengths.

use super::Peer;
use crate::support::{PROGRAM, Server, need, run};

/// A disk whose extents are these, as nbdkit's eval plugin tells them; `min_block` 1 is for any place.
fn told(size: u64, extents: &[&str], min_block: u32) -> Peer {
    let size = format!("get_size=echo {size}");
    let lines: Vec<String> = extents.iter().map(|extent| format!("echo {extent}")).collect();
    let extents = format!("extents={}", lines.join("; "));
    let read = "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none";
    let block = format!("blocksize-minimum={min_block}");
    let plugin = ["eval", &size, "can_extents=exit 0", &extents, read];
    match min_block {
        1 => Peer::nbdkit(&plugin),
        _ => Peer::nbdkit(
            &[&["--filter=blocksize-policy"], &plugin[..], &[&block, "blocksize-error-policy=error"]]
                .concat(),
        ),
    }
}

#[test]
fn extents_of_every_kind_and_length_pass_through() {
    need!("extents_of_every_kind_and_length_pass_through", "nbdkit", "nbdinfo");
    let kinds = ["0 8 hole", "8 16", "24 8 hole", "32 8 zero", "40 24 hole,zero"];
    let fine = ["0 1 hole,zero", "1 511", "512 1 hole", "513 4000 zero", "4513 61023 hole"];
    for (size, extents, min_block) in [
        (32, &["0 8 hole", "8 16", "24 8 hole"][..], 1),
        (64, &kinds[..], 1),
        (65_536, &fine[..], 1),
        (65_536, &fine[..], 4096),
    ] {
        let peer = told(size, extents, min_block);
        let map = |uri: &str| run("nbdinfo", &["--map", "--json", uri]);
        let expected = map(&peer.uri());
        assert_eq!(expected.matches("\"offset\"").count(), extents.len(), "{expected}");
        let server = Server::serve(&[&peer.uri()]);
        assert_eq!(map(&server.uri("")), expected, "{size} {extents:?} {min_block}");
        let second =
            Server::serve(&[&server.uri(""), "--detect-zeroes", "on", "--throttle", "iops-total=100000"]);
        assert_eq!(map(&second.uri("")), expected, "through layers, and twice");
        // What an overlay does not hold is the server's.
        let overlay = Server::serve(&[&peer.uri(), "--snapshot"]);
        assert_eq!(map(&overlay.uri("")), expected, "through an overlay");
        let ours = run(PROGRAM, &["info", "--map", &peer.uri()]);
        assert_eq!(ours.lines().count(), extents.len(), "{ours}");
    }
}
