//! Marks in an image's header: in use by this program, and dirty or corrupt, which imago must not see where the image is
//! only read.
#![deny(unsafe_code)]

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use super::{BLOCK, Host, header, index, to_io};
use crate::Flags;

impl Host {
    /// Has imago open an image that is marked dirty or corrupt.
    pub(in crate::backend::image) fn hide_marks(&self) {
        self.0.marks_hidden.store(true, Relaxed);
    }

    /// Marks the image as in use, or as closed, in the file and in what is kept back.
    ///
    /// # Errors
    /// The file's.
    pub(in crate::backend::image) async fn mark_in_use(&self, in_use: bool) -> io::Result<()> {
        let _filling = self.0.filling.lock().await;
        self.0.in_use.store(in_use, Relaxed);
        if let Some(mut blocks) = self.blocks()
            && let Some(first) = blocks.get_mut(&0)
        {
            header::mark_in_use(&mut first[..], in_use);
        }
        let mut first = self.read_file(0, index(BLOCK)).await?;
        header::mark_in_use(&mut first, in_use);
        self.0.file.write(0, first, Flags::NONE).await.map_err(to_io)
    }

    /// Hides the marks for dirty and corrupt in bytes that imago reads at `offset`, if it must not see them.
    pub(super) fn without_marks(&self, offset: u64, bytes: &mut [u8]) {
        if self.0.marks_hidden.load(Relaxed)
            && let Some(at) = header::MARKS_AT.checked_sub(offset)
            && let Some(byte) = bytes.get_mut(index(at))
        {
            *byte &= !header::MARKS;
        }
    }
}
