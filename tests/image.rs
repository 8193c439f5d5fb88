//! Disk images: `qemu-img` makes them and judges what random requests through the server leave of them, and the other
//! way round; kills amid a load of writes; images that nobody should trust.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

#[path = "image/clusters.rs"]
mod clusters;
#[path = "image/crash.rs"]
mod crash;
#[path = "image/damage.rs"]
mod damage;
#[path = "image/hostile.rs"]
mod hostile;
#[path = "image/journal.rs"]
mod journal;
#[path = "image/loss.rs"]
mod loss;
#[path = "image/names.rs"]
mod names;
#[path = "image/status.rs"]
mod status;
mod support;
#[path = "image/tables.rs"]
mod tables;
#[path = "image/thin.rs"]
mod thin;
#[path = "image/words.rs"]
mod words;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nbd_proto::{Command as Nbd, CommandFlags, ReplyStyle};
use support::{Client, NO_FLAGS, Random, Server, text};
use tempfile::TempDir;

const SIZE: usize = 12 << 20;

/// A program's output; None, said aloud, where it is not installed.
fn tool(test: &str, name: &str, args: &[&str]) -> Option<Output> {
    match Command::new(name).args(args).output() {
        Ok(output) => Some(output),
        Err(error) => {
            #[allow(clippy::disallowed_methods)] // a test's own stderr
            let _ = std::io::stderr().write_all(format!("SKIP: {test}: {name}: {error}\n").as_bytes());
            None
        }
    }
}

/// Whether qemu-img is there.
fn has_qemu_img(test: &str) -> bool {
    tool(test, "qemu-img", &["--version"]).is_some()
}

/// Runs qemu-img, which must succeed.
fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What qemu-img finds wrong with an image; leaks are allowed.
fn check(path: &Path) {
    let checked = || {
        let output = Command::new("qemu-img").args(["check", "-f", "qcow2", text(path)]).output().unwrap();
        let said = [&output.stdout[..], &output.stderr].concat();
        (String::from_utf8_lossy(&said).into_owned(), output)
    };
    let (mut said, mut output) = checked();
    // After a kill the kernel may take a moment to let go of the locks.
    for _ in 0..100 {
        if !said.contains("Failed to get") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        (said, output) = checked();
    }
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}: {said}", path.display());
}

/// A folder, and paths in it.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Whether an image holds these bytes.
    fn compare(&self, format: &str, image: &Path, bytes: &[u8]) {
        let model = self.file("model.raw", bytes);
        qemu_img(&["compare", "-f", format, "-F", "raw", text(image), text(&model)]);
    }

    /// Serves a qcow2 image that holds `model`, does so many random things to both, and holds one against the other.
    fn serve_and_compare(&self, image: &Path, model: &mut [u8], random: &mut Random, steps: usize) {
        self.serve_args_and_compare(image, &[], model, random, steps);
    }

    fn serve_args_and_compare(
        &self,
        image: &Path,
        args: &[&str],
        model: &mut [u8],
        random: &mut Random,
        steps: usize,
    ) {
        let server = Server::serve(&[&[text(image)][..], args].concat());
        let mut client = server.client(ReplyStyle::Structured);
        assert!(read_all(&mut client, model.len()) == model);
        load(&mut client, model, random, steps);
        client.disconnect();
        server.stop();
        check(image);
        self.compare("qcow2", image, model);
    }
}

/// A disk's first content: data, zeroes and holes.
fn content(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for part in bytes.chunks_mut(512 << 10) {
        match random.below(3) {
            0 => part.fill(0),
            1 => part.copy_from_slice(&random.bytes(512 << 10)),
            // What can be compressed.
            _ => part.fill(random.bytes(1)[0] | 1),
        }
    }
    bytes
}

/// Random requests, each checked against the model.
fn load(client: &mut Client, model: &mut [u8], random: &mut Random, steps: usize) {
    for _ in 0..steps {
        let most = random.pick(&[100, 512, 4096, 70_000, 1 << 20]);
        let mut length = 1 + random.index(most);
        let mut start = random.index(model.len() - length);
        if random.below(2) == 0 {
            (start, length) = (start / 512 * 512, length.next_multiple_of(512));
        }
        let fua = if random.below(8) == 0 { CommandFlags::FUA } else { NO_FLAGS };
        let part = start..start + length;
        let (offset, len) = (start as u64, length as u64);
        match random.below(10) {
            0..5 => {
                let data = random.bytes(length);
                assert_eq!(client.call_write(fua, offset, &data).error, None);
                model[part].copy_from_slice(&data);
            }
            5 => {
                let hole = if random.below(2) == 0 { CommandFlags::NO_HOLE } else { NO_FLAGS };
                assert_eq!(
                    client.call(Nbd::WriteZeroes, CommandFlags(fua.0 | hole.0), offset, len).error,
                    None
                );
                model[part].fill(0);
            }
            6 => {
                assert_eq!(client.call(Nbd::Trim, fua, offset, len).error, None);
                // It may hold anything now, but it stays.
                let now = client.read(offset, len);
                model[part].copy_from_slice(&now);
            }
            7 => client.flush(),
            _ => assert!(client.read(offset, len) == model[part], "read of {length} at {start}"),
        }
    }
}

/// Reads all of a disk.
fn read_all(client: &mut Client, len: usize) -> Vec<u8> {
    (0..len).step_by(1 << 20).flat_map(|at| client.read(at as u64, (len - at).min(1 << 20) as u64)).collect()
}

/// Every kind of qcow2 that is served, as options of qemu-img.
const VARIANTS: &[&[&str]] = &[
    &[],
    &["-o", "cluster_size=512"],
    &["-o", "cluster_size=4096,refcount_bits=64"],
    &["-o", "cluster_size=2M"],
    &["-o", "compat=0.10"],
    &["-o", "refcount_bits=1"],
    &["-o", "lazy_refcounts=on"],
    &["-c"],
    &["-c", "-o", "cluster_size=4096"],
    &["-o", "preallocation=metadata"],
    &["-o", "preallocation=full"],
];

#[test]
fn what_we_write_qemu_reads() {
    if !has_qemu_img("what_we_write_qemu_reads") {
        return;
    }
    let mut random = Random::new(0x5eed_5001);
    for variant in VARIANTS {
        println!("{variant:?}");
        let place = Place::new();
        let mut model = content(&mut random);
        let (raw, image) = (place.file("first.raw", &model), place.path("disk.qcow2"));
        qemu_img(&[&["convert", "-f", "raw", "-O", "qcow2"], *variant, &[text(&raw), text(&image)]].concat());
        place.serve_and_compare(&image, &mut model, &mut random, 60);
    }
}

#[test]
fn chains_and_data_files_are_written_at_the_top_alone() {
    if !has_qemu_img("chains_and_data_files_are_written_at_the_top_alone") {
        return;
    }
    let mut random = Random::new(0x5eed_5002);
    for (compat, cluster) in [("1.1", "65536"), ("1.1", "4096"), ("0.10", "65536")] {
        let place = Place::new();
        let mut model = content(&mut random);
        // The lowest is shorter than those above.
        let base = place.file("base.raw", &model[..SIZE - 700_000]);
        model[SIZE - 700_000..].fill(0);
        let (middle, top) = (place.path("middle.qcow2"), place.path("top.qcow2"));
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512",
            "-b",
            "base.raw",
            "-F",
            "raw",
            text(&middle),
            &SIZE.to_string(),
        ]);
        let options = format!("compat={compat},cluster_size={cluster}");
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            "-b",
            "middle.qcow2",
            "-F",
            "qcow2",
            text(&top),
        ]);
        let below = (fs::read(&base).unwrap(), fs::read(&middle).unwrap());
        place.serve_and_compare(&top, &mut model, &mut random, 120);
        assert!(
            below == (fs::read(&base).unwrap(), fs::read(&middle).unwrap()),
            "what is below is only read"
        );
    }
    for raw in ["off", "on"] {
        let place = Place::new();
        let mut model = vec![0; SIZE];
        let (image, data) = (place.path("disk.qcow2"), place.path("disk.data"));
        let options = format!("data_file={},data_file_raw={raw}", text(&data));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&image), &SIZE.to_string()]);
        place.serve_args_and_compare(&image, &["--data-file", text(&data)], &mut model, &mut random, 100);
    }
}

/// Many at once, in any order, with neighbours that touch and some that do not, and reads and writes between them.
#[test]
fn trims_that_wait_together_leave_their_neighbours_alone() {
    if !has_qemu_img("trims_that_wait_together_leave_their_neighbours_alone") {
        return;
    }
    let mut random = Random::new(0x5eed_500b);
    for (compat, cluster) in [("1.1", 4096), ("1.1", 65536), ("0.10", 65536)] {
        let place = Place::new();
        let mut model = random.bytes(SIZE);
        let (raw, image) = (place.file("first.raw", &model), place.path("disk.qcow2"));
        let options = format!("compat={compat},cluster_size={cluster}");
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&image)]);
        let server = Server::serve(&[text(&image)]);
        let mut client = server.client(ReplyStyle::Structured);
        // The lower half is trimmed but for every fifth cluster; the upper one is read and written.
        let mut trims: Vec<usize> = (0..SIZE / 2 / cluster).filter(|n| n % 5 != 4).collect();
        for n in (1..trims.len()).rev() {
            trims.swap(n, random.index(n + 1));
        }
        let mut asked = 0;
        for (n, trim) in trims.iter().enumerate() {
            let at = trim * cluster;
            asked += 1;
            client.ask(Nbd::Trim, NO_FLAGS, at as u64, cluster as u64);
            model[at..at + cluster].fill(0);
            if n % 70 == 0 {
                let at = SIZE / 2 + random.index(SIZE / 2 - 3000);
                let data = random.bytes(3000);
                client.ask_write(NO_FLAGS, at as u64, &data);
                asked += 1;
                for _ in 0..std::mem::take(&mut asked) {
                    assert_eq!(client.answer().error, None);
                }
                model[at..at + 3000].copy_from_slice(&data);
                assert!(client.read(at as u64, 3000) == data);
            }
        }
        for _ in 0..asked {
            assert_eq!(client.answer().error, None);
        }
        assert!(read_all(&mut client, SIZE) == model);
        client.disconnect();
        server.stop();
        check(&image);
        place.compare("qcow2", &image, &model);
    }
}

#[test]
fn images_with_snapshots_in_them_keep_these() {
    if !has_qemu_img("images_with_snapshots_in_them_keep_these") {
        return;
    }
    let mut random = Random::new(0x5eed_5003);
    let place = Place::new();
    let mut model = content(&mut random);
    let before = model.clone();
    let (raw, image) = (place.file("first.raw", &model), place.path("disk.qcow2"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", text(&raw), text(&image)]);
    qemu_img(&["snapshot", "-c", "before", text(&image)]);
    place.serve_and_compare(&image, &mut model, &mut random, 120);
    let old = place.path("old.raw");
    qemu_img(&["convert", "-l", "before", "-O", "raw", text(&image), text(&old)]);
    assert!(fs::read(&old).unwrap() == before);
}

#[test]
fn what_qemu_writes_we_read() {
    const TEST: &str = "what_qemu_writes_we_read";
    if !has_qemu_img(TEST) || tool(TEST, "qemu-io", &["--version"]).is_none() {
        return;
    }
    let mut random = Random::new(0x5eed_5004);
    for variant in VARIANTS.iter().filter(|variant| !variant.contains(&"-c")) {
        let place = Place::new();
        let (image, raw) = (place.path("disk.qcow2"), place.path("disk.raw"));
        qemu_img(&[&["create", "-q", "-f", "qcow2"], *variant, &[text(&image), &SIZE.to_string()]].concat());
        let mut commands = Vec::new();
        for _ in 0..60 {
            let length = 512 * (1 + random.index(600));
            let start = random.index((SIZE - length) / 512) * 512;
            let pattern = random.below(255) + 1;
            commands.push(match random.below(5) {
                0 => format!("write -z {start} {length}"),
                1 => format!("write -z -u {start} {length}"),
                2 => format!("discard {start} {length}"),
                _ => format!("write -P {pattern} {start} {length}"),
            });
        }
        let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
        let written =
            tool(TEST, "qemu-io", &[&["-f", "qcow2"], &commands[..], &[text(&image)]].concat()).unwrap();
        assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(&image), text(&raw)]);
        let expected = fs::read(&raw).unwrap();
        let server = Server::serve(&[text(&image), "-r"]);
        let mut client = server.client(ReplyStyle::Structured);
        // Twice: the second time the map knows the way.
        for _ in 0..2 {
            assert!(read_all(&mut client, SIZE) == expected, "{variant:?}");
        }
        client.disconnect();
        server.stop();
    }
}

#[test]
fn vmdk_images_are_read() {
    if !has_qemu_img("vmdk_images_are_read") {
        return;
    }
    let mut random = Random::new(0x5eed_5005);
    let model = content(&mut random);
    for subformat in ["monolithicFlat", "twoGbMaxExtentFlat", "monolithicSparse", "streamOptimized"] {
        let place = Place::new();
        let (raw, image) = (place.file("first.raw", &model), place.path("disk.vmdk"));
        let options = format!("subformat={subformat}");
        qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", &options, text(&raw), text(&image)]);
        match Server::try_serve(&[text(&image), "-r"]) {
            Ok(server) => {
                assert!(subformat.ends_with("Flat"));
                let mut client = server.client(ReplyStyle::Structured);
                for _ in 0..2 {
                    assert!(read_all(&mut client, SIZE) == model, "{subformat}");
                }
                client.disconnect();
                server.stop();
                let log = Server::try_serve(&[text(&image)]).err().unwrap();
                assert!(log.contains("--read-only") && log.lines().count() == 1, "{log}");
            }
            Err(log) => {
                assert!(!subformat.ends_with("Flat"), "{log}");
                assert!(log.contains("qemu-img convert") && log.lines().count() == 1, "{log}");
            }
        }
    }
}

#[test]
fn the_whole_chain_is_locked() {
    const TEST: &str = "the_whole_chain_is_locked";
    if !has_qemu_img(TEST) || tool(TEST, "qemu-io", &["--version"]).is_none() {
        return;
    }
    let place = Place::new();
    let (base, top) = (place.path("base.qcow2"), place.path("top.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", text(&base), "1M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", text(&top)]);
    let write = |image: &Path| {
        let args = ["-f", "qcow2", "-c", "write 0 512", text(image)];
        tool(TEST, "qemu-io", &args).unwrap().status.success()
    };
    let server = Server::serve(&[text(&top)]);
    assert!(!write(&base) && !write(&top));
    // Two that only read go together.
    let other = place.path("other.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", text(&other)]);
    let second = Server::serve(&[text(&other)]);
    second.stop();
    server.stop();
    assert!(write(&base) && write(&top));
}
