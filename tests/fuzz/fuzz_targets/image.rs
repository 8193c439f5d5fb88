//! An image that nobody vouches for is opened, described, and read: no panic, no memory by its header's word, no reads
//! that do not end.
//!
//! Input: whether it is opened for writing (1 byte, its lowest bit), how many blocks of 4 KiB the file is longer than
//! what follows (1 byte), then the file.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::LazyLock;

use bridge::backend::file::FileOptions;
use bridge::backend::image::{ImageAccess, describe, open_any};
use bridge::{Backend, Buffer, Flags};
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};

/// In memory, one for each process.
static PATH: LazyLock<PathBuf> =
    LazyLock::new(|| PathBuf::from(format!("/dev/shm/nbdbridge-fuzz-{}.img", std::process::id())));

thread_local! {
    static RUNTIME: LocalRuntime = Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())
        .expect("an event loop");
}

fuzz_target!(|input: &[u8]| {
    let Some(([first, more], data)) = input.split_first_chunk() else { return };
    let mut file = File::create(&*PATH).expect("a file in memory");
    file.write_all(data).expect("it takes the image");
    file.set_len(data.len() as u64 + 4096 * u64::from(*more)).expect("and more");
    drop(file);
    let _ = describe(&PATH, None, false);
    let options = FileOptions { read_only: first & 1 == 0, lock: false, ..FileOptions::default() };
    if let Ok(image) = open_any(&PATH, None, options, &ImageAccess::default()) {
        RUNTIME.with(|runtime| runtime.block_on(look(&*image)));
    }
    let _ = std::fs::remove_file(&*PATH);
});

/// Both ends, and what is said of them.
async fn look(image: &dyn Backend) {
    let size = image.geometry().size;
    let len = size.min(64 << 10);
    for offset in [0, size - len] {
        let _ = image.read(offset, Buffer::new(usize::try_from(len).expect("at most 64 KiB")), Flags::NONE).await;
        if len > 0 {
            let extents = image.block_status(offset, len, Flags::NONE).await.unwrap_or_default();
            let sum: u64 = extents.iter().map(|extent| extent.len).sum();
            assert!(sum <= len && extents.iter().all(|extent| extent.len > 0), "{extents:?}");
        }
    }
}
