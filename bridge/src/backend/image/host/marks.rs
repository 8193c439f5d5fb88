//! Marks in an image's header: in use by this program, and dirty or corrupt, which imago must not see where the image is
//! only read. And names there, which imago takes for text.
#![deny(unsafe_code)]

use std::io;
use std::ops::Range;
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

    /// Has imago read other bytes in the place of names that are not UTF-8: the files that they lead to are open already.
    pub(in crate::backend::image) fn hide_names(&self, names: Vec<(Range<usize>, Vec<u8>)>) {
        // There is one image in a file, which is opened once.
        let _ = self.0.hidden_names.set(names);
    }

    /// Hides names in bytes that imago reads at `offset`.
    pub(super) fn without_names(&self, offset: u64, bytes: &mut [u8]) {
        for (place, _) in self.0.hidden_names.get().into_iter().flatten() {
            for at in place.clone() {
                if let Some(byte) = byte_at(bytes, offset, at) {
                    *byte = b'?';
                }
            }
        }
    }

    /// Puts the names back into bytes that imago writes at `offset`.
    pub(super) fn with_names(&self, offset: u64, bytes: &mut [u8]) {
        for (place, name) in self.0.hidden_names.get().into_iter().flatten() {
            for (at, original) in place.clone().zip(name) {
                if let Some(byte) = byte_at(bytes, offset, at) {
                    *byte = *original;
                }
            }
        }
    }
}

/// The byte at `at` of the file, in bytes that lie at `offset`.
fn byte_at(bytes: &mut [u8], offset: u64, at: usize) -> Option<&mut u8> {
    let within = u64::try_from(at).ok()?.checked_sub(offset)?;
    bytes.get_mut(usize::try_from(within).ok()?)
}
