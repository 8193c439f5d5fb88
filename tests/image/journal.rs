//! `kill -9` of a server of a qcow2 image: what was answered, and not flushed, is there when the image is opened next.

use std::ops::Range;
use std::time::Duration;

use rustix::process::Signal;

use super::*;

const DISK: usize = 12 << 20;
const ROUNDS: usize = 3;

/// An image, its disk as it was answered, and the folder that servers have their journals in.
pub(crate) struct World {
    place: Place,
    pub(crate) image: PathBuf,
    pub(crate) model: Vec<u8>,
    random: Random,
}

impl World {
    /// A fresh image that qemu-img makes with these options; over a base full of bytes where `backed`.
    pub(crate) fn new(seed: u64, options: &str, backed: bool) -> World {
        World::make(seed, options, backed, DISK)
    }

    /// A fresh image of so many bytes.
    pub(crate) fn with_size(seed: u64, options: &str, size: usize) -> World {
        World::make(seed, options, false, size)
    }

    fn make(seed: u64, options: &str, backed: bool, size: usize) -> World {
        let mut random = Random::new(seed);
        let place = Place::new();
        let model = if backed { random.bytes(size) } else { vec![0; size] };
        let (base, image) = (place.file("base.raw", &model), place.path("disk.qcow2"));
        let options = options.replace("DATA", text(&place.path("disk.data")));
        let size = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if backed {
            args.extend(["-b", text(&base), "-F", "raw"]);
        }
        args.extend([text(&image), &size]);
        qemu_img(&args);
        World { image, model, random, place }
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.place.path("control")
    }

    /// After a kill the kernel may take a moment to let go of the image.
    pub(crate) fn serve(&self, flags: &[&str]) -> Server {
        let start = std::time::Instant::now();
        let data = self.place.path("disk.data");
        let own: &[&str] = match data.exists() {
            true => &[text(&self.image), "--data-file", text(&data)],
            false => &[text(&self.image)],
        };
        loop {
            match Server::try_serve_in(&self.control(), &[own, flags].concat()) {
                Ok(server) => return server,
                Err(log) => {
                    assert!(log.contains("in use") && start.elapsed() < Duration::from_secs(20), "{log}");
                }
            }
        }
    }

    pub(crate) fn journals(&self) -> usize {
        let names = fs::read_dir(self.control()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| text(Path::new(name)).ends_with(".journal")).count()
    }

    fn range(&mut self, longest: usize) -> Range<usize> {
        let start = self.random.index(DISK - longest) / 512 * 512;
        start..start + 512 * (1 + self.random.index(longest / 512))
    }

    /// Changes the disk by `count` requests, which are answered and not flushed.
    pub(crate) fn change(&mut self, client: &mut Client, count: usize) {
        for _ in 0..count {
            let range = self.range(96 << 10);
            let (offset, length) = (range.start as u64, range.len() as u64);
            match self.random.below(10) {
                0 | 1 => {
                    let flags = self.random.pick(&[NO_FLAGS, CommandFlags::NO_HOLE]);
                    assert_eq!(client.call(Nbd::WriteZeroes, flags, offset, length).error, None);
                    self.model[range].fill(0);
                }
                2 => {
                    assert_eq!(client.call(Nbd::Trim, NO_FLAGS, offset, length).error, None);
                    let left = client.read(offset, length);
                    self.model[range].copy_from_slice(&left);
                }
                _ => {
                    let data = self.random.bytes(range.len());
                    client.write(offset, &data);
                    self.model[range].copy_from_slice(&data);
                }
            }
        }
    }

    #[track_caller]
    pub(crate) fn compare(&self, client: &mut Client, when: &str) {
        const PIECE: usize = 1 << 20;
        for (n, expected) in self.model.chunks(PIECE).enumerate() {
            let found = client.read((n * PIECE) as u64, expected.len() as u64);
            let wrong =
                found.chunks(512).zip(expected.chunks(512)).filter(|(found, expected)| found != expected);
            assert_eq!(wrong.count(), 0, "{when}: wrong sectors in MiB {n}");
        }
    }
}

pub(crate) fn kill(mut server: Server) {
    server.signal(Signal::KILL);
    server.wait(Duration::from_secs(20)).unwrap();
}

fn survives(seed: u64, options: &str, backed: bool) {
    let mut world = World::new(seed, options, backed);
    for round in 0..ROUNDS {
        let server = world.serve(&[]);
        let mut client = server.client(ReplyStyle::Structured);
        world.compare(&mut client, &format!("{options}, round {round}"));
        world.change(&mut client, 60);
        world.compare(&mut client, &format!("{options}, round {round}, before the kill"));
        kill(server);
    }
    let server = world.serve(&[]);
    world.compare(&mut server.client(ReplyStyle::Structured), options);
    server.stop();
    assert_eq!(world.journals(), 0, "a clean end leaves no journal");
    check(&world.image);
    assert!(fs::read(&world.image).unwrap()[88..96] == [0; 8], "a clean end leaves no mark");
    let raw = world.place.path("disk.raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(&world.image), text(&raw)]);
    assert!(fs::read(&raw).unwrap() == world.model, "{options}: qemu reads something else");
}

#[test]
fn answered_writes_survive_a_kill() {
    if !has_qemu_img("answered_writes_survive_a_kill") {
        return;
    }
    for (n, (options, backed)) in [
        ("cluster_size=64k", false),
        ("cluster_size=64k", true),
        ("cluster_size=4k", true),
        ("cluster_size=2M", true),
        ("cluster_size=4k,refcount_bits=1", false),
        ("cluster_size=64k,refcount_bits=64,preallocation=metadata", false),
        ("cluster_size=64k,data_file=DATA", false),
        ("cluster_size=4k,data_file=DATA,data_file_raw=on", false),
    ]
    .into_iter()
    .enumerate()
    {
        survives(0x5eed_a600 + n as u64, options, backed);
    }
}

#[test]
fn a_refcount_table_that_is_too_small_grows_in_a_replay() {
    if !has_qemu_img("a_refcount_table_that_is_too_small_grows_in_a_replay") {
        return;
    }
    survives(0x5eed_a610, "cluster_size=512", false);
    survives(0x5eed_a611, "cluster_size=512", true);
}

#[test]
fn a_journal_of_an_image_that_another_program_has_changed_is_discarded() {
    let test = "a_journal_of_an_image_that_another_program_has_changed_is_discarded";
    if !has_qemu_img(test) || tool(test, "qemu-io", &["--version"]).is_none() {
        return;
    }
    let mut world = World::new(0x5eed_a620, "cluster_size=64k", false);
    let server = world.serve(&[]);
    world.change(&mut server.client(ReplyStyle::Structured), 20);
    kill(server);
    check(&world.image);
    let write = ["-f", "qcow2", "-c", "write -P 0x55 1M 128k", text(&world.image)];
    tool(test, "qemu-io", &write).unwrap();
    let server = world.serve(&[]);
    let log = server.log();
    assert!(log.contains("are lost: another program has written to the image since"), "{log}");
    let mut client = server.client(ReplyStyle::Structured);
    assert!(client.read(1 << 20, 128 << 10).iter().all(|byte| *byte == 0x55));
    world.model = [client.read(0, 6 << 20), client.read(6 << 20, 6 << 20)].concat();
    world.change(&mut client, 20);
    kill(server);
    let server = world.serve(&[]);
    world.compare(&mut server.client(ReplyStyle::Structured), "after another kill");
    server.stop();
    check(&world.image);
}

#[test]
fn what_only_reads_sees_what_is_in_the_journal() {
    if !has_qemu_img("what_only_reads_sees_what_is_in_the_journal") {
        return;
    }
    for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=4k,data_file=DATA"] {
        let mut world = World::new(0x5eed_a630, options, true);
        let server = world.serve(&[]);
        world.change(&mut server.client(ReplyStyle::Structured), 40);
        kill(server);
        let before = fs::read(&world.image).unwrap();
        let mut server = world.serve(&["-r"]);
        world.compare(&mut server.client(ReplyStyle::Structured), "read-only");
        server.signal(Signal::TERM);
        server.wait(Duration::from_secs(20)).unwrap();
        let server = world.serve(&["--snapshot"]);
        let mut client = server.client(ReplyStyle::Structured);
        world.compare(&mut client, "snapshot");
        client.write(0, &[7; 65536]);
        drop(client);
        server.stop();
        let top = world.place.path("top.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", text(&world.image), "-F", "qcow2", text(&top)]);
        let server = Server::serve_in(&world.control(), &[text(&top)]);
        world.compare(&mut server.client(ReplyStyle::Structured), "backing image");
        server.stop();
        assert!(fs::read(&world.image).unwrap() == before, "{options}: a reader has changed the image");
        let info = Command::new(support::PROGRAM).args(["info", text(&world.image)]).output().unwrap();
        let said = String::from_utf8_lossy(&info.stdout).into_owned();
        assert!(said.contains("in use or not closed"), "{said}");
        let server = world.serve(&[]);
        world.compare(&mut server.client(ReplyStyle::Structured), "written again");
        server.stop();
        check(&world.image);
    }
}

#[test]
fn without_a_runtime_folder_the_image_is_served_with_a_warning() {
    if !has_qemu_img("without_a_runtime_folder_the_image_is_served_with_a_warning") {
        return;
    }
    let mut world = World::new(0x5eed_a640, "cluster_size=64k", false);
    let nowhere = world.place.file("nowhere", b"a file");
    let server = Server::serve_in(&nowhere, &[text(&world.image)]);
    let log = server.log();
    assert!(log.contains("will not survive a crash of this process: no journal: "), "{log}");
    let mut client = server.client(ReplyStyle::Structured);
    world.change(&mut client, 20);
    world.compare(&mut client, "without a journal");
    client.flush();
    kill(server);
    let server = world.serve(&[]);
    world.compare(&mut server.client(ReplyStyle::Structured), "flushed");
    server.stop();
    check(&world.image);
}
