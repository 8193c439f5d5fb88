//! Reads and writes of a backend by a layer itself, on whichever path will do. What is aligned to the backend's minimum
//! block is the caller's business.

use crate::{Backend, Buffer, Flags, Result};

/// Reads from a backend on whichever path.
pub(crate) async fn get(backend: &dyn Backend, offset: u64, len: u64) -> Result<Buffer> {
    let mut buf = Buffer::new(usize::try_from(len).unwrap_or(usize::MAX));
    match backend.try_read(offset, &mut buf, Flags::NONE) {
        Some(result) => result.map(|()| buf),
        None => backend.read(offset, buf, Flags::NONE).await,
    }
}

/// Stores in a backend on whichever path.
pub(crate) async fn put(backend: &dyn Backend, offset: u64, data: &[u8]) -> Result<()> {
    match backend.try_write(offset, data, Flags::NONE) {
        Some(result) => result,
        None => backend.write(offset, Buffer::copy_of(data), Flags::NONE).await,
    }
}

/// The same with a buffer that can be handed over.
pub(crate) async fn put_owned(backend: &dyn Backend, offset: u64, data: Buffer) -> Result<()> {
    match backend.try_write(offset, &data, Flags::NONE) {
        Some(result) => result,
        None => backend.write(offset, data, Flags::NONE).await,
    }
}
