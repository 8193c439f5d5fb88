//! `kill -9` of a server of a fresh qcow2 image under fio's verify: clients that connect again find all that was answered.

use super::*;
use crate::support::mount::Mount;

/// Kills the server and starts it again, a few times.
fn torment(upstream: &mut Upstream, seed: u64) {
    let mut random = Random::new(seed);
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(200 + 2 * u64::from(random.bytes(1)[0])));
        upstream.kill();
        std::thread::sleep(Duration::from_millis(u64::from(random.bytes(1)[0])));
        upstream.start();
    }
}

/// Waits for fio, which must have found what it wrote.
fn judge(fio: Child, log: &str) {
    let output = fio.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}\n{log}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains("verify:"), "{said}");
}

/// Ends the server, whose image must be in order then, but for clusters that leaked.
fn finish(mut upstream: Upstream) {
    if let Some(server) = upstream.server.take() {
        server.stop();
    }
    let checked = try_run("qemu-img", &["check", "-q", "-f", "qcow2", text(&upstream.path("image"))]);
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
}

#[test]
fn a_qcow2_server_killed_and_started_again_loses_nothing() {
    need!("a_qcow2_server_killed_and_started_again_loses_nothing", "qemu-img");
    if !has_fio() {
        eprintln!("SKIP: a_qcow2_server_killed_and_started_again_loses_nothing: no fio with an nbd engine");
        return;
    }
    let mut upstream = Upstream::with_format("/var/tmp", "qcow2", "48M");
    let proxy = Server::serve(&[&upstream.uri()]);
    let fio = verify(&proxy.uri(""), upstream.folder.path(), "48M");
    torment(&mut upstream, 0x5eed_7011);
    judge(fio, &proxy.log());
    assert!(proxy.log().contains("connected again"), "{}", proxy.log());
    proxy.stop();
    finish(upstream);
}

#[test]
fn a_qcow2_server_killed_behind_a_fuse_file_loses_nothing() {
    need!("a_qcow2_server_killed_behind_a_fuse_file_loses_nothing", "qemu-img", "fio");
    if std::fs::metadata("/dev/fuse").is_err() {
        eprintln!("SKIP: a_qcow2_server_killed_behind_a_fuse_file_loses_nothing: no /dev/fuse");
        return;
    }
    let mut upstream = Upstream::with_format("/var/tmp", "qcow2", "48M");
    let mut mount = Mount::at(tempfile::tempdir().unwrap(), &upstream.uri(), "file", &[]);
    let mut fio = Command::new("timeout");
    fio.args(["-k", "1", "100", "fio", "--name=job", "--ioengine=psync", "--rw=randwrite", "--bs=4k"]);
    fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--randseed=7", "--size=40M"]);
    fio.args(["--fsync=200", "--minimal", "--filename", text(&mount.path)]);
    let fio = fio.current_dir(upstream.folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let fio = fio.spawn().unwrap();
    torment(&mut upstream, 0x5eed_7012);
    judge(fio, &mount.log());
    assert!(mount.log().contains("connected again"), "{}", mount.log());
    mount.stop();
    finish(upstream);
}
