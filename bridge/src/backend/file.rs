//! stub
#![allow(missing_docs)]
use crate::OpenError;
pub struct FileOptions {
    pub read_only: bool,
    pub cache: CacheMode,
    pub aio: AioMode,
    pub discard: DiscardMode,
    pub lock: bool,
}
pub enum CacheMode {
    Writeback,
    None,
    DirectSync,
    WriteThrough,
    Unsafe,
}
pub enum AioMode {
    Auto,
    IoUring,
    Threads,
}
pub enum DiscardMode {
    Unmap,
    Ignore,
}
pub struct FileBackend;
impl FileBackend {
    pub fn open(path: &std::path::Path, _o: &FileOptions) -> Result<super::memory::MemoryBackend, OpenError> {
        Err(OpenError::NotFound(path.to_owned()))
    }
}
