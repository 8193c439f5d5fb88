//! What a probed raw image lets nobody write.

use super::*;
use crate::ErrorKind;

fn opened(format: Option<ImageFormat>) -> (tempfile::TempDir, Box<dyn Backend>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    let disk = open_any(&path, format, FileOptions::default(), &ImageAccess::default()).unwrap();
    (folder, disk)
}

async fn write(disk: &dyn Backend, offset: u64, bytes: &[u8]) -> Result<()> {
    if let Some(done) = disk.try_write(offset, bytes, Flags::NONE) {
        return done;
    }
    disk.write(offset, Buffer::copy_of(bytes), Flags::NONE).await
}

#[test]
fn the_first_sector_stays_raw_also_in_parts() {
    block_on(async {
        let (_folder, disk) = opened(None);
        let kind = |result: Result<()>| result.unwrap_err().kind();
        assert_eq!(kind(write(&*disk, 0, b"QFI\xfb").await), ErrorKind::ReadOnly);
        let mut sectors = vec![0; 4096];
        sectors[..4].copy_from_slice(b"KDMV");
        assert_eq!(kind(write(&*disk, 0, &sectors).await), ErrorKind::ReadOnly);
        // Byte by byte: the last one is refused.
        write(&*disk, 0, b"QF").await.unwrap();
        write(&*disk, 3, b"\xfb").await.unwrap();
        assert_eq!(kind(write(&*disk, 2, b"I").await), ErrorKind::ReadOnly);
        write(&*disk, 0, b"QED").await.unwrap();
        assert_eq!(kind(disk.write_zeroes(3, 1, Flags::NONE).await), ErrorKind::ReadOnly);
        assert_eq!(kind(disk.trim(3, 4000, Flags::NONE).await), ErrorKind::ReadOnly);
        // Elsewhere, and anything else, is as free as ever.
        write(&*disk, 512, b"QFI\xfb").await.unwrap();
        write(&*disk, 1, b"QFI\xfb").await.unwrap();
        write(&*disk, 0, &[0; 4096]).await.unwrap();
        disk.write_zeroes(0, 8192, Flags::NONE).await.unwrap();
        let all = disk.read(0, Buffer::new(8192), Flags::NONE).await.unwrap();
        assert!(all.iter().all(|byte| *byte == 0));
    });
}

#[test]
fn a_sector_that_is_cut_off_stays_raw_too() {
    block_on(async {
        let (_folder, disk) = opened(None);
        let kind = |result: Result<()>| result.unwrap_err().kind();
        // Of this line the beginning is what VMDK descriptors have.
        write(&*disk, 0, b"#\nversion=17").await.unwrap();
        assert_eq!(kind(disk.shrink(11).await), ErrorKind::ReadOnly);
        assert_eq!(disk.geometry().size, 8192);
        disk.shrink(12).await.unwrap();
        disk.shrink(0).await.unwrap();
        // What becomes longer goes on with a zero.
        disk.grow(3).await.unwrap();
        assert_eq!(kind(write(&*disk, 0, b"QED").await), ErrorKind::ReadOnly);
        write(&*disk, 0, b"QEE").await.unwrap();
        disk.grow(600).await.unwrap();
        write(&*disk, 512, b"QED\0").await.unwrap();
    });
}

#[test]
fn a_format_that_was_given_is_believed() {
    block_on(async {
        let (_folder, disk) = opened(Some(ImageFormat::Raw));
        write(&*disk, 0, b"QFI\xfb").await.unwrap();
    });
}

#[test]
fn a_write_that_was_given_up_leaves_doubt() {
    block_on(async {
        let (_folder, disk) = opened(None);
        let mut write_one = disk.write(0, Buffer::copy_of(b"ab"), Flags::NONE);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        // On a file system in memory it may be done at once, and then leaves none.
        while write_one.as_mut().poll(&mut context).is_pending() {
            tokio::task::yield_now().await;
        }
        drop(write_one);
        write(&*disk, 0, b"cd").await.unwrap();
    });
}
