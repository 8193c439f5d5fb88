//! Where clusters come from, seen from outside: a kill shows no block of another one, growing makes room for tables
//! first, and a block device has an end.

use std::time::Duration;

use rustix::process::Signal;

use super::support::{CONTROL_FOLDER, Loop, PROGRAM};
use super::*;

/// Makes the disk that a server serves larger.
fn grow(server: &Server, image: &Path, size: &str) {
    let mut command = Command::new(PROGRAM);
    command.args(["resize", text(image), size]);
    command.env(CONTROL_FOLDER, server.socket().with_file_name("control"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}; {}", server.log());
}

/// Zeroes that keep their cluster, then a longer write over them that lies elsewhere: the kept cluster is free then, and
/// the file still names it.
#[test]
fn a_kill_shows_no_block_the_data_of_another() {
    if !has_qemu_img("a_kill_shows_no_block_the_data_of_another") {
        return;
    }
    for cluster in [512, 4096, 8192, 65536] {
        let place = Place::new();
        let image = place.path("disk.qcow2");
        let clusters = format!("cluster_size={cluster}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &clusters, text(&image), "16M"]);
        let mut server = Server::serve(&[text(&image)]);
        let mut client = server.client(ReplyStyle::Structured);
        let block = |n: usize| (n * cluster) as u64;
        client.write(block(5), &vec![0x41; cluster]);
        client.write(block(4), &vec![0x44; cluster]);
        client.flush();
        assert_eq!(client.call(Nbd::WriteZeroes, NO_FLAGS, block(4), cluster as u64).error, None);
        client.flush();
        assert_eq!(
            client.call(Nbd::WriteZeroes, CommandFlags::NO_HOLE, block(5), cluster as u64).error,
            None
        );
        client.write(block(4), &vec![0x42; 2 * cluster]);
        client.write(block(9), &vec![0x43; cluster]);
        server.signal(Signal::KILL);
        server.wait(Duration::from_secs(10)).unwrap();
        let raw = place.path("now.raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(&image), text(&raw)]);
        let bytes = &fs::read(&raw).unwrap()[5 * cluster..6 * cluster];
        assert!(
            bytes.iter().all(|byte| [0, 0x41, 0x42].contains(byte)),
            "clusters of {cluster}: block 5 holds {:#x}",
            bytes[0]
        );
    }
}

#[test]
fn a_disk_grows_over_a_longer_backing_image() {
    if !has_qemu_img("a_disk_grows_over_a_longer_backing_image") {
        return;
    }
    for (cluster, version) in [(512, "1.1"), (4096, "1.1"), (65536, "1.1"), (65536, "0.10"), (2 << 20, "1.1")]
    {
        let place = Place::new();
        let (base, image) = (place.file("base", &vec![b'Z'; 1 << 20]), place.path("disk.qcow2"));
        let options = format!("cluster_size={cluster},compat={version}");
        let backing = ["-b", text(&base), "-F", "raw", text(&image), "100k"];
        qemu_img(&[&["create", "-q", "-f", "qcow2", "-o", &options][..], &backing].concat());
        let server = Server::serve(&[text(&image)]);
        let mut client = server.client(ReplyStyle::Structured);
        client.write(98 << 10, &[7; 1024]);
        grow(&server, &image, "3M");
        let mut client = server.client(ReplyStyle::Structured);
        client.write((2 << 20) + 5, &[9; 600]);
        client.flush();
        let mut told = vec![0; 3 << 20];
        told[..100 << 10].fill(b'Z');
        told[98 << 10..][..1024].fill(7);
        told[(2 << 20) + 5..][..600].fill(9);
        assert!(client.read(0, 3 << 20) == told, "{version}, clusters of {cluster}");
        server.stop();
        check(&image);
        let raw = place.path("now.raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(&image), text(&raw)]);
        assert!(
            fs::read(&raw).unwrap() == told,
            "{version}, clusters of {cluster}: qemu-img reads something else"
        );
    }
}

#[test]
fn an_image_on_a_block_device_ends_where_the_device_does() {
    const DEVICE: u64 = 4 << 20;
    if !has_qemu_img("an_image_on_a_block_device_ends_where_the_device_does") {
        return;
    }
    for cluster in [512, 4096, 65536] {
        let place = Place::new();
        let file = place.path("device");
        fs::File::create(&file).unwrap().set_len(DEVICE).unwrap();
        let Some(device) = Loop::new(&file, &[]) else {
            eprintln!("SKIP: an_image_on_a_block_device_ends_where_the_device_does: no loop devices here");
            return;
        };
        let clusters = format!("cluster_size={cluster}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &clusters, &device.0, "2M"]);
        let server = Server::serve(&[&device.0, "-f", "qcow2"]);
        let mut client = server.client(ReplyStyle::Structured);
        client.write(0, &[1; 1 << 20]);
        client.flush();
        grow(&server, Path::new(&device.0), "8M");
        let mut client = server.client(ReplyStyle::Structured);
        // Until nothing more fits. What was answered is there, and the rest of the disk goes on.
        let (mut stored, mut full) = (16, false);
        while stored < 128 && !full {
            let answer = client.call_write(NO_FLAGS, stored << 16, &[2; 65536]);
            full = answer.error.is_some();
            assert!(
                !full || answer.error == Some(nbd_proto::NbdError::NoSpc),
                "{:?}; {}",
                answer.error,
                server.log()
            );
            stored += u64::from(!full);
        }
        assert!(full && stored > 40, "clusters of {cluster}: {stored} pieces of 64 KiB on 4 MiB");
        client.write(5, &[3; 700]);
        client.flush();
        let mut told = vec![2; usize::try_from(stored << 16).unwrap()];
        told[..1 << 20].fill(1);
        told[5..705].fill(3);
        assert!(client.read(0, stored << 16) == told, "clusters of {cluster}");
        // Space that is given back can be used.
        assert_eq!(client.call(Nbd::Trim, NO_FLAGS, 16 << 16, 4 << 16).error, None);
        client.flush();
        client.write(stored << 16, &[4; 65536]);
        client.flush();
        server.stop();
        check(Path::new(&device.0));
        let raw = place.path("now.raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &device.0, text(&raw)]);
        told[16 << 16..20 << 16].fill(0);
        told.extend([4; 65536]);
        assert!(
            fs::read(&raw).unwrap()[..told.len()] == told,
            "clusters of {cluster}: qemu-img reads something else"
        );
    }
}

/// The journal of an image on a block device is that of its disk, and not of the next one behind the same node.
#[test]
fn a_kill_loses_nothing_on_a_block_device_and_another_disk_is_another_image() {
    let test = "a_kill_loses_nothing_on_a_block_device_and_another_disk_is_another_image";
    if !has_qemu_img(test) {
        return;
    }
    let place = Place::new();
    let file = place.path("device");
    fs::File::create(&file).unwrap().set_len(4 << 20).unwrap();
    let Some(device) = Loop::new(&file, &[]) else {
        eprintln!("SKIP: {test}: no loop devices here");
        return;
    };
    qemu_img(&["create", "-q", "-f", "qcow2", &device.0, "2M"]);
    let control = place.path("control");
    let serve = || {
        let start = std::time::Instant::now();
        loop {
            match Server::try_serve_in(&control, &[&device.0, "-f", "qcow2"]) {
                Ok(server) => return server,
                Err(log) => {
                    assert!(log.contains("in use") && start.elapsed() < Duration::from_secs(20), "{log}");
                }
            }
        }
    };
    let kill = |mut server: Server| {
        server.signal(Signal::KILL);
        server.wait(Duration::from_secs(20)).unwrap();
    };
    let server = serve();
    server.client(ReplyStyle::Structured).write(1 << 20, &[0x61; 65536]);
    kill(server);
    let server = serve();
    assert!(server.client(ReplyStyle::Structured).read(1 << 20, 65536) == [0x61; 65536], "{}", server.log());
    server.client(ReplyStyle::Structured).write(0, &[0x62; 65536]);
    kill(server);
    // The same bytes on another disk behind the same node.
    let losetup = |args: &[&str]| assert!(Command::new("losetup").args(args).status().unwrap().success());
    losetup(&["-d", &device.0]);
    losetup(&[&device.0, text(&file)]);
    let server = serve();
    assert!(server.log().contains("has no journal of it"), "{}", server.log());
    assert!(server.client(ReplyStyle::Structured).read(1 << 20, 65536) == [0x61; 65536]);
    assert!(server.client(ReplyStyle::Structured).read(0, 65536) == [0; 65536]);
    server.stop();
    check(Path::new(&device.0));
}
