//! The stacks that every check runs on. One line adds one.

use std::any::Any;

use bridge::Backend;
use bridge::backend::crash::CrashBackend;
use bridge::backend::memory::MemoryBackend;
use bridge::backend::null::NullBackend;
use bridge::layer::{Fault, ReadOnly, Throttle};

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
    Stack { name: "null", kind: Kind::Discards, make: |size| made(null(size)) },
    Stack { name: "throttle over null", kind: Kind::Discards, make: |size| made(throttle(null(size), "iops-total=30000")) },
    Stack { name: "read-only memory", kind: Kind::ReadOnly, make: |size| made(read_only(memory(size))) },
    Stack { name: "throttle over read-only crash", kind: Kind::ReadOnly, make: |size| made(throttle(read_only(crash(size)), "iops-total=30000")) },
];

fn made(backend: Box<dyn Backend>) -> Result<Made, String> {
    Ok((backend, None))
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
