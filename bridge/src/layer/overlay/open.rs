//! Making and opening overlays: sizes, the checks of a file that is kept, and which base it belongs to.

use std::sync::Arc;

use super::image::{self, Identity, Layout, RECENT_MAGIC};
use super::map::Map;
use super::{BLOCK_BYTES, MAX_BYTES, Overlay, Shared};
pub use crate::boot::{BootId, boot_id};
use crate::transfer::{get, put};
use crate::{Backend, Error, Flags};

/// How many samples of a base are looked at, and how long each is in bytes.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4096;

/// Tables are read and written in pieces of this many bytes.
const PIECE: usize = 64 << 10;

/// Why an overlay could not be made or opened. Each text is the end of a line that begins with the file's name.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The base is beyond [`MAX_BYTES`].
    #[error("a base of {0} bytes is too large for an overlay (at most {MAX_BYTES})")]
    TooLarge(u64),
    /// Something else than an overlay of this program.
    #[error("is no overlay of this program{0}; choose another name")]
    Foreign(&'static str),
    /// Its tables are not where this program puts them.
    #[error(
        "was changed by another program since: it is a qcow2 image like any other now; open it with qemu's tools"
    )]
    Changed,
    /// The file is shorter than its tables say.
    #[error("is cut short: {0} bytes are missing at its end")]
    Short(u64),
    /// The base has another size.
    #[error("belongs to a base of {expected} bytes, and this one has {found}; name the base it was made for")]
    OtherSize {
        /// In bytes.
        expected: u64,
        /// In bytes.
        found: u64,
    },
    /// The base holds something else.
    #[error(
        "belongs to another base, or its base was written since it was made; name the base it was made for"
    )]
    OtherBase,
    /// A request failed.
    #[error("{0}")]
    Request(#[from] Error),
}

type Result<T> = std::result::Result<T, OverlayError>;

/// The size of the file behind a temporary overlay over a base of so many bytes.
///
/// # Errors
/// `TooLarge`.
pub fn temporary_bytes(size: u64) -> Result<u64> {
    check_size(size)?;
    Ok(size.next_multiple_of(BLOCK_BYTES))
}

/// The size of a kept overlay's file over a base of so many bytes; sparse.
///
/// # Errors
/// `TooLarge`.
pub fn kept_bytes(size: u64) -> Result<u64> {
    check_size(size)?;
    Ok(Layout::new(size).len)
}

fn check_size(size: u64) -> Result<()> {
    if size > MAX_BYTES { Err(OverlayError::TooLarge(size)) } else { Ok(()) }
}

impl Overlay {
    /// A temporary overlay. `store` is of [`temporary_bytes`] and reads as zeroes; what it holds at the end is of no
    /// use to anybody.
    ///
    /// # Errors
    /// `TooLarge`.
    pub fn temporary(base: Box<dyn Backend>, store: Box<dyn Backend>) -> Result<Self> {
        check_size(base.geometry().size)?;
        Ok(Overlay { shared: Arc::new(Shared::new(base, store, 0, None)) })
    }

    /// Makes an overlay that is kept. `store` is of [`kept_bytes`] and reads as zeroes; `name` and `format` are how
    /// qemu would open the base. The header is written last: a file that was not finished is no overlay.
    ///
    /// # Errors
    /// `TooLarge`, `Request`.
    pub async fn create(
        base: Box<dyn Backend>,
        store: Box<dyn Backend>,
        name: &str,
        format: &str,
        boot: Option<BootId>,
    ) -> Result<Self> {
        let size = base.geometry().size;
        check_size(size)?;
        let layout = Layout::new(size);
        let header = layout.header(&identify(&*base).await?, name, format)?;
        put_all(&*store, layout.l1, &layout.l1_entries()).await?;
        put_all(&*store, layout.refcount_table, &layout.refcount_entries()).await?;
        let ones: Vec<u8> = (0..layout.meta_clusters()).flat_map(|_| 1_u16.to_be_bytes()).collect();
        put_all(&*store, layout.refcounts, &ones).await?;
        put(&*store, layout.recent_header, &recent_header(boot)).await?;
        store.flush().await?;
        put(&*store, 0, &header).await?;
        store.flush().await?;
        let map = Map::new(layout);
        Ok(Overlay { shared: Arc::new(Shared::new(base, store, layout.data, Some(map))) })
    }

    /// Opens an overlay that was kept, over its base. What a crash of this program left unflushed is there again, as
    /// long as `boot` is the boot that it was written in.
    ///
    /// # Errors
    /// Where it is no overlay of ours, or not of this base.
    pub async fn open(
        base: Box<dyn Backend>,
        store: Box<dyn Backend>,
        boot: Option<BootId>,
        read_only: bool,
    ) -> Result<Self> {
        let size = base.geometry().size;
        let present = store.geometry().size;
        let cluster = get(&*store, 0, present.min(BLOCK_BYTES)).await?;
        let Some(identity) = image::identity(&cluster) else {
            let what = if image::is_qcow2(&cluster) { ", but a qcow2 image of another one" } else { "" };
            return Err(OverlayError::Foreign(what));
        };
        if identity.size != size {
            return Err(OverlayError::OtherSize { expected: identity.size, found: size });
        }
        check_size(size)?;
        let layout = Layout::new(size);
        if !layout.is_untouched(&cluster, size) {
            return Err(OverlayError::Changed);
        }
        if present < layout.len {
            return Err(OverlayError::Short(layout.len - present));
        }
        if identity != identify(&*base).await? {
            return Err(OverlayError::OtherBase);
        }
        for (at, expected) in
            [(layout.l1, layout.l1_entries()), (layout.refcount_table, layout.refcount_entries())]
        {
            check_table(&*store, at, &expected).await?;
        }
        let mut shared = Shared::new(base, store, layout.data, Some(Map::new(layout)));
        shared.read_only = read_only;
        shared.load_map(&layout).await?;
        shared.load_recent(&layout, boot).await?;
        Ok(Overlay { shared: Arc::new(shared) })
    }
}

impl Shared {
    async fn load_map(&self, layout: &Layout) -> Result<()> {
        self.each_data(layout.l2, self.blocks.count() * 8, async |at, bytes| {
            let first = (at - layout.l2) / 8;
            for (block, entry) in (first..).zip(bytes.chunks_exact(8)) {
                match image::u64_at(entry, 0).unwrap_or(u64::MAX) {
                    0 => {}
                    entry if entry == layout.l2_entry(block) => self.blocks.mark_mapped(block..block + 1),
                    _ => return Err(OverlayError::Changed),
                }
            }
            Ok(())
        })
        .await
    }

    /// Takes over what is newer than the map, if it was written in this boot; else forgets it, and notes this boot.
    async fn load_recent(&self, layout: &Layout, boot: Option<BootId>) -> Result<()> {
        let header = get(&*self.store, layout.recent_header, 32).await?;
        if boot.is_some() && header[..] == recent_header(boot) {
            return self
                .each_data(layout.recent, self.blocks.count(), async |at, bytes| {
                    for (block, _) in (at - layout.recent..).zip(bytes).filter(|(_, byte)| **byte == 1) {
                        if !self.blocks.present(block) {
                            self.blocks.mark_fresh(block..block + 1);
                        }
                    }
                    Ok(())
                })
                .await;
        }
        if !self.read_only {
            self.store.write_zeroes(layout.recent, layout.len - layout.recent, Flags::NONE).await?;
            put(&*self.store, layout.recent_header, &recent_header(boot)).await?;
        }
        Ok(())
    }

    /// Reads a table, but for its holes.
    async fn each_data(
        &self,
        start: u64,
        len: u64,
        act: impl AsyncFn(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = (start, start + len);
        while at < end {
            for extent in self.store.block_status(at, end - at, Flags::NONE).await? {
                let stop = at + extent.len;
                // Whole entries, wherever the extent begins and ends.
                let mut from = if extent.kind.reads_as_zeroes() { stop } else { at & !7 };
                while from < stop {
                    let count = (stop.next_multiple_of(8).min(end) - from).min(PIECE as u64);
                    act(from, &get(&*self.store, from, count).await?).await?;
                    from += count;
                }
                at = stop;
            }
        }
        Ok(())
    }
}

/// Before the number of a boot that nobody knows there is nothing: it is like no other.
fn recent_header(boot: Option<BootId>) -> [u8; 32] {
    let mut header = [0; 32];
    if let Some(boot) = boot {
        header[..16].copy_from_slice(RECENT_MAGIC);
        header[16..].copy_from_slice(&boot);
    }
    header
}

/// What a base is known by again: its size, and a checksum (FNV-1a) of samples that lie evenly over it.
async fn identify(base: &dyn Backend) -> Result<Identity> {
    let size = base.geometry().size;
    let blocks = size.div_ceil(SAMPLE_BYTES);
    let count = blocks.min(SAMPLES);
    let mut samples = 0xcbf2_9ce4_8422_2325_u64;
    for n in 0..count {
        // The first, the last, and even steps between.
        let block = if count == 1 { 0 } else { n * (blocks - 1) / (count - 1) };
        let at = block * SAMPLE_BYTES;
        for byte in &*get(base, at, SAMPLE_BYTES.min(size - at)).await? {
            samples = (samples ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(Identity { size, samples })
}

async fn check_table(store: &dyn Backend, at: u64, expected: &[u8]) -> Result<()> {
    for (n, part) in (0..).zip(expected.chunks(PIECE)) {
        if get(store, at + n * PIECE as u64, part.len() as u64).await?[..] != *part {
            return Err(OverlayError::Changed);
        }
    }
    Ok(())
}

async fn put_all(store: &dyn Backend, at: u64, bytes: &[u8]) -> Result<()> {
    for (n, part) in (0..).zip(bytes.chunks(PIECE)) {
        put(store, at + n * PIECE as u64, part).await?;
    }
    Ok(())
}
