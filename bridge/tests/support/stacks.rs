//! The stacks that every check runs on. One line adds one.

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::process::{Child, Command};
use std::time::Duration;

use bridge::Backend;
use bridge::backend::crash::CrashBackend;
use bridge::backend::file::{AioMode, CacheMode, DiscardMode, FileBackend, FileOptions};
use bridge::backend::image::{
    CreateOptions, ImageAccess, ImageBackend, ImageFormat, ImageOptions, create, open_any,
};
use bridge::backend::memory::MemoryBackend;
use bridge::backend::nbd::{NbdBackend, NbdOptions};
use bridge::backend::null::NullBackend;
use bridge::layer::overlay::{self, Overlay};
use bridge::layer::{DetectZeroes, Fault, ReadOnly, Slice, Throttle, ThrottleHandle, ZeroMode};

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
    /// Keeps it. New, it holds [`pattern`].
    Filled,
    /// Drops it, and reads as zeroes.
    Discards,
    /// Refuses it; holds [`pattern`].
    ReadOnly,
}

pub const ALL: &[Kind] = &[Kind::Stores, Kind::Filled, Kind::Discards, Kind::ReadOnly];
pub const WRITABLE: &[Kind] = &[Kind::Stores, Kind::Filled, Kind::Discards];
pub const STORES: &[Kind] = &[Kind::Stores, Kind::Filled];
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

const fn filled(name: &'static str, make: fn(u64) -> Result<Made, String>) -> Stack {
    Stack { name, kind: Kind::Filled, make }
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
    stores("nbd, FUA without flush", |size| remote(Offer { flags: FUA_WITHOUT_FLUSH, ..Offer::new(size, ReplyStyle::Structured) })),
    stores("nbd, blocks of 512", |size| remote(blocks(size, 512))),
    stores("nbd, blocks of 4 KiB", |size| remote(blocks(size, 4096))),
    stores("nbd, blocks of 8 KiB", |size| remote(blocks(size, 8192))),
    stores("nbd, blocks of 64 KiB", |size| remote(blocks(size, 65536))),
    stores("throttle over detect-zeroes over fault over slice over nbd, blocks of 8 KiB", |size| remote(blocks(size + 65536, 8192)).map(|(disk, keep)| {
        let len = size.next_multiple_of(8192);
        let late = fault(slice(disk, 8192, len), "seed=4,delay-ms=1,delay-rate=0.02,op=read");
        (throttle(detect(late, ZeroMode::Unmap), "iops-total=50000"), keep)
    })),
    stores("overlay over nbd, blocks of 64 KiB, in memory", |size| remote(blocks(size, 65536)).map(|(disk, keep)| {
        let size = disk.geometry().size;
        (temporary(disk, memory(overlay::temporary_bytes(size).unwrap())), keep)
    })),
    stores("kept overlay over nbd, blocks of 4 KiB, in crash", |size| remote(blocks(size, 4096)).map(|(disk, keep)| {
        let size = disk.geometry().size;
        (kept(disk, crash(overlay::kept_bytes(size).unwrap())), keep)
    })),
    stores("throttle over file on tmpfs", |size| file("/dev/shm", size, FileOptions::default()).map(|(disk, keep)| (throttle(disk, "iops-total=30000"), keep))),
    stores("slice of memory", |size| made(slice(memory(size + (1 << 20) + 7), 4096, size))),
    stores("slice of a file on disk", |size| file(DISK_FOLDER, size + 70_000, FileOptions::default()).map(|(disk, keep)| (slice(disk, 65_537, size), keep))),
    stores("detect-zeroes over memory", |size| made(detect(memory(size), ZeroMode::On))),
    stores("detect-zeroes, unmap, over a file on tmpfs", |size| file("/dev/shm", size, FileOptions::default()).map(|(disk, keep)| (detect(disk, ZeroMode::Unmap), keep))),
    stores("detect-zeroes, unmap, over crash", |size| made(detect(crash(size), ZeroMode::Unmap))),
    stores("throttle in a group", |size| made(group(memory(size), "iops-total=30000"))),
    stores("overlay over memory", |size| made(temporary(memory(size), memory(overlay::temporary_bytes(size).unwrap())))),
    stores("overlay over null, in crash", |size| made(temporary(null(size), crash(overlay::temporary_bytes(size).unwrap())))),
    stores("kept overlay over crash, in memory", |size| made(kept(crash(size), memory(overlay::kept_bytes(size).unwrap())))),
    filled("overlay over a read-only disk, in memory", |size| made(temporary(read_only(memory(size)), memory(overlay::temporary_bytes(size).unwrap())))),
    filled("overlay over read-only crash, in a file on tmpfs", |size| {
        let (store, keep) = file("/dev/shm", overlay::temporary_bytes(size).unwrap(), FileOptions::default())?;
        Ok((temporary(read_only(crash(size)), store), keep))
    }),
    filled("kept overlay in a file on disk", |size| {
        let (store, keep) = file(DISK_FOLDER, overlay::kept_bytes(size).unwrap(), FileOptions::default())?;
        Ok((kept(read_only(memory(size)), store), keep))
    }),
    filled("kept overlay in a file on disk, O_DIRECT", |size| {
        let options = FileOptions { cache: CacheMode::None, ..Default::default() };
        let (store, keep) = file(DISK_FOLDER, overlay::kept_bytes(size).unwrap(), options)?;
        Ok((kept(read_only(memory(size)), store), keep))
    }),
    filled("throttle over detect-zeroes over slice over overlay over fault", |size| {
        let base = read_only(slice(memory(size + 65_536), 65_536, size));
        let late = fault(base, "seed=4,delay-ms=1,delay-rate=0.02,op=read");
        let overlay = temporary(late, crash(overlay::temporary_bytes(size).unwrap()));
        made(throttle(detect(slice(overlay, 0, size), ZeroMode::Unmap), "iops-total=50000"))
    }),
    stores("raw, probed", |size| probed("/dev/shm", size)),
    stores("qcow2 on tmpfs", |size| qcow2("/dev/shm", size, 65536, false, FileOptions::default())),
    stores("qcow2 on disk", |size| qcow2(DISK_FOLDER, size, 65536, false, FileOptions::default())),
    stores("qcow2 on disk, small clusters, threads", |size| qcow2(DISK_FOLDER, size, 512, false, FileOptions { aio: AioMode::Threads, ..Default::default() })),
    stores("qcow2 on disk, large clusters, O_DIRECT", |size| qcow2(DISK_FOLDER, size, 1 << 20, false, FileOptions { cache: CacheMode::None, ..Default::default() })),
    stores("qcow2 over qcow2 on tmpfs", |size| qcow2("/dev/shm", size, 4096, true, FileOptions::default())),
    stores("qcow2 on disk, write-through, no discard", |size| qcow2(DISK_FOLDER, size, 65536, false, FileOptions { cache: CacheMode::WriteThrough, discard: DiscardMode::Ignore, ..Default::default() })),
    stores("throttle over qcow2 over qcow2", |size| qcow2("/dev/shm", size, 65536, true, FileOptions::default()).map(|(disk, keep)| (throttle(disk, "iops-total=30000"), keep))),
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

/// The same, without saying that it is raw.
fn probed(folder: &str, size: u64) -> Result<Made, String> {
    let folder = tempfile::tempdir_in(folder).map_err(|error| format!("{folder}: {error}"))?;
    let path = folder.path().join("image");
    File::create(&path).and_then(|image| image.set_len(size)).map_err(|error| error.to_string())?;
    let disk = open_any(&path, None, FileOptions::default(), &ImageAccess::default())
        .map_err(|error| error.to_string())?;
    Ok((disk, Some(Box::new(folder))))
}

/// A new qcow2 image; `layered` over another one that has some clusters of zeroes.
fn qcow2(
    folder: &str,
    size: u64,
    cluster_size: u32,
    layered: bool,
    file: FileOptions,
) -> Result<Made, String> {
    let folder = tempfile::tempdir_in(folder).map_err(|error| format!("{folder}: {error}"))?;
    let path = folder.path().join("image.qcow2");
    let mut options = CreateOptions {
        size: Some(size - size % 512),
        cluster_size,
        backing: None,
        backing_format: None,
        any_backing: false,
    };
    if layered {
        let below = folder.path().join("below.qcow2");
        create(&below, &options).map_err(|error| error.to_string())?;
        let image = ImageOptions {
            file: FileOptions::default(),
            format: ImageFormat::Qcow2,
            access: ImageAccess::default(),
        };
        let below = ImageBackend::open(&below, &image).map_err(|error| error.to_string())?;
        for n in 0..20 {
            let zeroes = bridge::Buffer::copy_of(&[0; 5000]);
            // Its clusters are allocated, and read as zeroes.
            wait_for(below.write(n * 300_000, zeroes, bridge::Flags::NONE))?;
        }
        options.backing = Some("below.qcow2".into());
    }
    create(&path, &options).map_err(|error| error.to_string())?;
    let image = ImageOptions { file, format: ImageFormat::Qcow2, access: ImageAccess::default() };
    let disk = ImageBackend::open(&path, &image).map_err(|error| error.to_string())?;
    Ok((Box::new(disk), Some(Box::new(folder))))
}

/// Waits on the spot for what another thread does.
fn wait_for(future: bridge::LocalFuture<'_, bridge::Result<()>>) -> Result<(), String> {
    let mut future = future;
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(result) => return result.map_err(|error| error.to_string()),
            std::task::Poll::Pending => std::thread::yield_now(),
        }
    }
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

const FUA_WITHOUT_FLUSH: TransmissionFlags =
    TransmissionFlags(ALL_FLAGS.0 & !TransmissionFlags::SEND_FLUSH.0);

/// An offer of whole blocks.
fn blocks(size: u64, min_block: u32) -> Offer {
    let size = size.next_multiple_of(u64::from(min_block));
    Offer { blocks: [min_block, 65536, 1 << 20], ..Offer::new(size, ReplyStyle::Structured) }
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

pub fn slice(inner: Box<dyn Backend>, start: u64, len: u64) -> Box<dyn Backend> {
    Box::new(Slice::new(inner, start, len))
}

pub fn detect(inner: Box<dyn Backend>, mode: ZeroMode) -> Box<dyn Backend> {
    Box::new(DetectZeroes::new(inner, mode))
}

/// A member of a group that has another one.
pub fn group(inner: Box<dyn Backend>, text: &str) -> Box<dyn Backend> {
    let group = ThrottleHandle::new(text.parse().unwrap()).unwrap();
    Throttle::join(null(1), &group);
    Box::new(Throttle::join(inner, &group))
}

pub fn temporary(base: Box<dyn Backend>, store: Box<dyn Backend>) -> Box<dyn Backend> {
    Box::new(Overlay::temporary(base, store).unwrap())
}

/// A new overlay that is kept. It is made on a thread of its own: the caller may be on a runtime already.
pub fn kept(base: Box<dyn Backend>, store: Box<dyn Backend>) -> Box<dyn Backend> {
    let make = || super::run(Overlay::create(base, store, "base", "raw", overlay::boot_id())).unwrap();
    Box::new(std::thread::scope(|scope| scope.spawn(make).join().unwrap()))
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
