//! The stacks that every check runs on. One line adds one.

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::process::{Child, Command};
use std::time::Duration;

use bridge::Backend;
use bridge::backend::crash::CrashBackend;
use bridge::backend::file::{AioMode, CacheMode, DiscardMode, FileBackend, FileOptions};
use bridge::backend::memory::MemoryBackend;
use bridge::backend::nbd::{NbdBackend, NbdOptions};
use bridge::backend::null::NullBackend;
use bridge::layer::{Fault, ReadOnly, Throttle};

use nbd_proto::uri::Uri;
use nbd_proto::{ReplyStyle, TransmissionFlags};

use super::nbd::{ALL_FLAGS, Act, Offer, Seen, Server};
use super::pattern;

/// What is asked for; odd on purpose. A stack may round it down (a loop device has whole sectors).
pub const DISK_BYTES: u64 = (6 << 20) + 4096 + 77;

/// What a stack does with what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Keeps it. New, it reads as zeroes.
    Stores,
    /// Drops it, and reads as zeroes.
    Discards,
    /// Refuses it; holds [`pattern`].
    ReadOnly,
}

pub const ALL: &[Kind] = &[Kind::Stores, Kind::Discards, Kind::ReadOnly];
pub const WRITABLE: &[Kind] = &[Kind::Stores, Kind::Discards];
pub const STORES: &[Kind] = &[Kind::Stores];
pub const READ_ONLY: &[Kind] = &[Kind::ReadOnly];

/// A backend, and what has to outlive it (a temporary folder, a loop device).
pub type Made = (Box<dyn Backend>, Option<Box<dyn Any>>);

/// One row of the table.
pub struct Stack {
    pub name: &'static str,
    pub kind: Kind,
    /// Makes a disk of about this size. An error is why it cannot be had on this machine.
    pub make: fn(u64) -> Result<Made, String>,
}

const fn stores(name: &'static str, make: fn(u64) -> Result<Made, String>) -> Stack {
    Stack { name, kind: Kind::Stores, make }
}

#[rustfmt::skip]
pub const STACKS: &[Stack] = &[
    stores("memory", |size| made(memory(size))),
    stores("crash", |size| made(crash(size))),
    stores("throttle, idle", |size| made(throttle(memory(size), ""))),
    stores("throttle, never full", |size| made(throttle(memory(size), "iops-total=100000000,bps-total=10T"))),
    stores("throttle, often full", |size| made(throttle(memory(size), "iops-total=30000,bps-read=8G,bps-write=8G"))),
    stores("throttle, every other request waits", |size| made(throttle(crash(size), "iops-read=4000,iops-read-max=4000,iops-write=4000,iops-size=1M"))),
    stores("fault, idle", |size| made(fault(memory(size), "seed=1"))),
    stores("fault, elsewhere", |size| made(fault(memory(size), "seed=1,error-rate=1,offset=1T"))),
    stores("fault, late", |size| made(fault(memory(size), "seed=1,delay-ms=1,delay-rate=0.05"))),
    stores("fault over throttle over crash", |size| made(fault(throttle(crash(size), "iops-total=50000"), "seed=2,delay-ms=0,op=write"))),
    stores("file on tmpfs", |size| file("/dev/shm", size, FileOptions::default())),
    stores("file on disk", |size| file(DISK_FOLDER, size, FileOptions::default())),
    stores("file on tmpfs, threads", |size| file("/dev/shm", size, FileOptions { aio: AioMode::Threads, ..Default::default() })),
    stores("file on disk, threads", |size| file(DISK_FOLDER, size, FileOptions { aio: AioMode::Threads, ..Default::default() })),
    stores("file on disk, O_DIRECT", |size| file(DISK_FOLDER, size, FileOptions { cache: CacheMode::None, ..Default::default() })),
    stores("file on disk, O_DIRECT, threads", |size| file(DISK_FOLDER, size, FileOptions { cache: CacheMode::None, aio: AioMode::Threads, ..Default::default() })),
    stores("file on disk, write-through, no discard", |size| file(DISK_FOLDER, size, FileOptions { cache: CacheMode::WriteThrough, discard: DiscardMode::Ignore, ..Default::default() })),
    stores("loop device", |size| loop_device(size, FileOptions::default())),
    stores("loop device, O_DIRECT", |size| loop_device(size, FileOptions { cache: CacheMode::None, ..Default::default() })),
    stores("nbd, simple replies", |size| remote(Offer::new(size, ReplyStyle::Simple))),
    stores("nbd, structured replies, small payloads", |size| remote(Offer { blocks: [1, 4096, 100_000], ..Offer::new(size, ReplyStyle::Structured) })),
    stores("nbd, extended headers, a connection each", |size| remote(Offer { flags: ALL_FLAGS | TransmissionFlags::CAN_MULTI_CONN, ..Offer::new(size, ReplyStyle::Extended) })),
    stores("nbd, cut off again and again", |size| cut_off(Offer { flags: ALL_FLAGS | TransmissionFlags::CAN_MULTI_CONN, ..Offer::new(size, ReplyStyle::Structured) })),
    stores("nbd, qemu-nbd", |size| qemu_nbd(size, &[])),
    stores("throttle over file on tmpfs", |size| file("/dev/shm", size, FileOptions::default()).map(|(disk, keep)| (throttle(disk, "iops-total=30000"), keep))),
    Stack { name: "null", kind: Kind::Discards, make: |size| made(null(size)) },
    Stack { name: "throttle over null", kind: Kind::Discards, make: |size| made(throttle(null(size), "iops-total=30000")) },
    Stack { name: "read-only memory", kind: Kind::ReadOnly, make: |size| made(read_only(memory(size))) },
    Stack { name: "nbd, qemu-nbd read-only", kind: Kind::ReadOnly, make: |size| qemu_nbd(size, &["--read-only"]) },
    Stack { name: "throttle over read-only crash", kind: Kind::ReadOnly, make: |size| made(throttle(read_only(crash(size)), "iops-total=30000")) },
];

fn made(backend: Box<dyn Backend>) -> Result<Made, String> {
    Ok((backend, None))
}

/// Where the build keeps its files: a disk's file system, as a rule.
const DISK_FOLDER: &str = env!("CARGO_TARGET_TMPDIR");

/// A new image in a temporary folder under `folder`.
fn file(folder: &str, size: u64, options: FileOptions) -> Result<Made, String> {
    let folder = tempfile::tempdir_in(folder).map_err(|error| format!("{folder}: {error}"))?;
    let path = folder.path().join("image");
    File::create(&path).and_then(|image| image.set_len(size)).map_err(|error| error.to_string())?;
    let disk = FileBackend::open(&path, &options).map_err(|error| error.to_string())?;
    Ok((Box::new(disk), Some(Box::new(folder))))
}

/// A loop device over such an image.
fn loop_device(size: u64, options: FileOptions) -> Result<Made, String> {
    struct Loop(String, #[expect(dead_code, reason = "removed when dropped")] tempfile::TempDir);
    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["--detach", &self.0]).status();
        }
    }
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let path = folder.path().join("image");
    File::create(&path)
        .and_then(|image| image.set_len(size - size % 512))
        .map_err(|error| error.to_string())?;
    let made = Command::new("losetup").args(["--find", "--show"]).arg(&path).output();
    let made = made.map_err(|error| format!("losetup: {error}"))?;
    if !made.status.success() {
        return Err(String::from_utf8_lossy(&made.stderr).trim().to_owned());
    }
    let device = Loop(String::from_utf8_lossy(&made.stdout).trim().to_owned(), folder);
    let disk = FileBackend::open(&device.0, &options).map_err(|error| error.to_string())?;
    Ok((Box::new(disk), Some(Box::new(device))))
}

/// A server of ours in this process.
fn remote(offer: Offer) -> Result<Made, String> {
    let server = Server::new(offer);
    Ok((Box::new(server.open(&NbdOptions::default())), Some(Box::new(server))))
}

/// The same, but now and then a request is carried out and the connection ends instead of its answer.
fn cut_off(offer: Offer) -> Result<Made, String> {
    let cut = |seen: &Seen<'_>| if seen.number % 37 == 36 { Act::HangUpAfter } else { Act::Well };
    let server = Server::with_script(offer, cut);
    Ok((Box::new(server.open(&NbdOptions::default())), Some(Box::new(server))))
}

/// QEMU's server. The image holds the pattern where it cannot be written.
fn qemu_nbd(size: u64, flags: &[&str]) -> Result<Made, String> {
    struct Qemu(Child, #[expect(dead_code, reason = "removed when dropped")] tempfile::TempDir);
    impl Drop for Qemu {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let (image, socket) = (folder.path().join("image"), folder.path().join("sock"));
    // Whole sectors: QEMU has no others.
    let size = size - size % 512;
    let made = File::create(&image).and_then(|mut file| {
        if flags.is_empty() {
            file.set_len(size)
        } else {
            file.write_all(&pattern(0, usize::try_from(size).unwrap()))
        }
    });
    made.map_err(|error| error.to_string())?;
    let mut command = Command::new("qemu-nbd");
    command.args(["--format=raw", "--persistent", "--shared=0", "--discard=unmap"]).args(flags);
    let child = command.arg("--socket").arg(&socket).arg(&image).spawn();
    let server = Qemu(child.map_err(|error| format!("qemu-nbd: {error}"))?, folder);
    let uri = Uri::unix(&socket, "");
    for _ in 0..500 {
        if let Ok(disk) = NbdBackend::open(&uri, &NbdOptions::default()) {
            return Ok((Box::new(disk), Some(Box::new(server))));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err("qemu-nbd does not answer".into())
}

pub fn memory(size: u64) -> Box<dyn Backend> {
    Box::new(MemoryBackend::new(size))
}

pub fn null(size: u64) -> Box<dyn Backend> {
    Box::new(NullBackend::new(size))
}

pub fn crash(size: u64) -> Box<dyn Backend> {
    Box::new(CrashBackend::new(vec![0; usize::try_from(size).unwrap()], 1))
}

pub fn throttle(inner: Box<dyn Backend>, text: &str) -> Box<dyn Backend> {
    Box::new(Throttle::new(inner, text.parse().unwrap()).unwrap())
}

pub fn fault(inner: Box<dyn Backend>, text: &str) -> Box<dyn Backend> {
    Box::new(Fault::new(inner, text.parse().unwrap()))
}

/// Fills the disk with [`pattern`] first.
pub fn read_only(inner: Box<dyn Backend>) -> Box<dyn Backend> {
    let size = usize::try_from(inner.geometry().size).unwrap();
    for from in (0..size).step_by(4096) {
        let len = 4096.min(size - from);
        inner.try_write(from as u64, &pattern(from as u64, len), bridge::Flags::NONE).unwrap().unwrap();
    }
    Box::new(ReadOnly::new(inner))
}
