//! Zeroes and trims over a chain whose images have clusters of different sizes, held against a byte array.

use super::*;
use crate::random::Random;

const SIZE: usize = 4 << 20;

fn qemu_img_ok(args: &[&str]) {
    let output = qemu_img(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn options() -> ImageOptions {
    ImageOptions { file: FileOptions::default(), format: ImageFormat::Qcow2, access: ImageAccess::default() }
}

/// An image of the chain, and the disk's bytes as they are with it on top.
fn layer(
    folder: &Path,
    name: &str,
    cluster: u64,
    below: Option<&str>,
    random: &mut Random,
    bytes: &mut [u8],
) {
    let path = folder.join(name);
    let clusters = format!("cluster_size={cluster}");
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &clusters];
    let backing = below.map(|below| folder.join(below));
    if let Some(backing) = &backing {
        args.extend(["-b", text(backing), "-F", "qcow2"]);
    }
    let size = SIZE.to_string();
    args.extend([text(&path), &size]);
    qemu_img_ok(&args);
    block_on(async {
        let disk = ImageBackend::open(&path, &options()).unwrap();
        for _ in 0..3 {
            let (from, len) = range(random, cluster);
            change(&disk, random.below(8), from, len, random, bytes).await;
        }
        disk.flush().await.unwrap();
    });
}

/// A range that often begins or ends at a cluster of one of the images.
fn range(random: &mut Random, cluster: u64) -> (usize, usize) {
    let size = SIZE as u64;
    let most = [4 * cluster, cluster, 4096, 300_000][usize::try_from(random.below(4)).unwrap()].min(size);
    let mut len = 1 + random.below(most);
    let mut from = random.below(size - len + 1);
    let unit = [1, 512, 4096, cluster][usize::try_from(random.below(4)).unwrap()].min(size / 2);
    from -= from % unit;
    len = len.next_multiple_of(unit).min(size - from);
    (usize::try_from(from).unwrap(), usize::try_from(len).unwrap())
}

async fn change(
    disk: &ImageBackend,
    kind: u64,
    from: usize,
    len: usize,
    random: &mut Random,
    bytes: &mut [u8],
) {
    let (offset, count) = (from as u64, len as u64);
    match kind {
        0 | 1 => {
            let flags = if kind == 0 { Flags::NO_HOLE } else { Flags::NONE };
            disk.write_zeroes(offset, count, flags).await.unwrap();
            bytes[from..from + len].fill(0);
        }
        2 => {
            disk.trim(offset, count, Flags::NONE).await.unwrap();
            let found = disk.read(offset, Buffer::new(len), Flags::NONE).await.unwrap();
            // Zero where it was trimmed, and as it was elsewhere.
            assert!(found.iter().zip(&bytes[from..]).all(|(found, was)| *found == 0 || found == was));
            bytes[from..from + len].copy_from_slice(&found);
        }
        _ => {
            let len = len.min(40_000);
            let value = u8::try_from(1 + random.below(255)).unwrap();
            disk.write(offset, Buffer::copy_of(&vec![value; len]), Flags::NONE).await.unwrap();
            bytes[from..from + len].fill(value);
        }
    }
}

#[test]
fn zeroes_are_zeroes_over_a_chain_of_any_cluster_sizes() {
    if !has_qemu_img("zeroes_are_zeroes_over_a_chain_of_any_cluster_sizes") {
        return;
    }
    const SIZES: [u64; 5] = [512, 4096, 32 << 10, 256 << 10, 2 << 20];
    let mut seed = 0;
    for top in SIZES {
        for middle in SIZES {
            // Each pair beside each other, and with a third one that changes.
            seed += 1;
            let base = SIZES[usize::try_from(seed * 7 / 3 % 5).unwrap()];
            let mut random = Random::new(seed);
            let folder = tempfile::tempdir().unwrap();
            let mut bytes = vec![0; SIZE];
            layer(folder.path(), "base", base, None, &mut random, &mut bytes);
            layer(folder.path(), "middle", middle, Some("base"), &mut random, &mut bytes);
            layer(folder.path(), "top", top, Some("middle"), &mut random, &mut bytes);
            let path = folder.path().join("top");
            let what = format!("clusters of {top} over {middle} over {base}");
            block_on(async {
                let disk = ImageBackend::open(&path, &options()).unwrap();
                for step in 0..6 {
                    let unit = [top, middle, base][usize::try_from(random.below(3)).unwrap()];
                    let (from, len) = range(&mut random, unit);
                    let kind = random.below(6);
                    change(&disk, kind, from, len, &mut random, &mut bytes).await;
                    // With its neighbours.
                    let seen = from.saturating_sub(70_000)..(from + len + 70_000).min(SIZE);
                    let buf = Buffer::new(seen.len());
                    let found = disk.read(seen.start as u64, buf, Flags::NONE).await.unwrap();
                    let differs = found.iter().zip(&bytes[seen]).position(|(found, told)| found != told);
                    assert_eq!(differs, None, "{what}: step {step}, kind {kind}, {len} bytes at {from}");
                }
                disk.flush().await.unwrap();
            });
            let raw = folder.path().join("raw");
            qemu_img_ok(&["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&raw)]);
            assert!(std::fs::read(&raw).unwrap() == bytes, "{what}: qemu-img reads something else");
        }
    }
}
