use std::future::Future;

use tokio::runtime::{Builder, LocalOptions};

use super::*;
use crate::Flags;
use crate::backend::memory::MemoryBackend;
use crate::random::Random;

const MIB: usize = 1 << 20;

fn run<T>(future: impl Future<Output = T>) -> T {
    Builder::new_current_thread().build_local(LocalOptions::default()).unwrap().block_on(future)
}

fn disk(image: &[u8]) -> MemoryBackend {
    let disk = MemoryBackend::new(image.len() as u64);
    disk.try_write(0, image, Flags::NONE).unwrap().unwrap();
    disk
}

fn table(image: &[u8]) -> Result<Option<Table>> {
    run(read(&disk(image), None))
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn entry(image: &mut [u8], record: usize, slot: usize, kind: u8, start: u32, len: u32) {
    let at = record + 446 + slot * 16;
    image[at + 4] = kind;
    put(image, at + 8, &start.to_le_bytes());
    put(image, at + 12, &len.to_le_bytes());
    put(image, record + 510, &[0x55, 0xaa]);
}

/// Two primary partitions, and an extended one with two logical ones.
fn mbr() -> Vec<u8> {
    let mut image = vec![0; 2 * MIB];
    entry(&mut image, 0, 0, 0x83, 8, 100);
    entry(&mut image, 0, 2, 0x0c, 200, 300);
    entry(&mut image, 0, 3, 0x05, 1000, 3000);
    entry(&mut image, 1000 * 512, 0, 0x83, 8, 90);
    entry(&mut image, 1000 * 512, 1, 0x05, 500, 600);
    entry(&mut image, 1500 * 512, 0, 0x82, 16, 64);
    image
}

/// A header with its checksums, at a place in sectors.
fn header(image: &mut [u8], sector: usize, place: usize, entries_at: usize, count: u32, size: u32) {
    let mut header = vec![0; 92];
    put(&mut header, 0, b"EFI PART");
    put(&mut header, 8, &[0, 0, 1, 0, 92, 0, 0, 0]);
    put(&mut header, 24, &(place as u64).to_le_bytes());
    put(&mut header, 72, &(entries_at as u64).to_le_bytes());
    put(&mut header, 80, &count.to_le_bytes());
    put(&mut header, 84, &size.to_le_bytes());
    let start = entries_at * sector;
    let len = usize::try_from(count * size).unwrap();
    if let Some(entries) = image.get(start..start + len) {
        let sum = u32::try_from(gpt::crc32(entries)).unwrap();
        put(&mut header, 88, &sum.to_le_bytes());
    }
    let sum = u32::try_from(gpt::crc32(&header)).unwrap();
    put(&mut header, 16, &sum.to_le_bytes());
    put(image, place * sector, &header);
}

fn gpt(sector: usize) -> Vec<u8> {
    let mut image = vec![0; 2 * MIB];
    entry(&mut image, 0, 0, 0xee, 1, u32::MAX);
    let last = image.len() / sector - 1;
    let copy = last - 128 * 128 / sector;
    for entries_at in [2, copy] {
        let at = entries_at * sector;
        for (slot, (first, end)) in [(0, (64_u64, 127_u64)), (4, (128, 128))] {
            let at = at + slot * 128;
            put(
                &mut image,
                at,
                &[
                    0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d,
                    0xe4,
                ],
            );
            put(&mut image, at + 32, &first.to_le_bytes());
            put(&mut image, at + 40, &end.to_le_bytes());
            put(&mut image, at + 56, &[b'r', 0, 7, 0, b'o', 0]);
        }
    }
    header(&mut image, sector, 1, 2, 128, 128);
    header(&mut image, sector, last, copy, 128, 128);
    image
}

fn places(table: &Table) -> Vec<(u32, u64, u64)> {
    table.partitions.iter().map(|one| (one.number, one.start, one.len)).collect()
}

#[test]
fn mbr_with_logical_partitions() {
    let table = table(&mbr()).unwrap().unwrap();
    assert_eq!((table.scheme, table.sector_bytes), (Scheme::Mbr, 512));
    let sectors = [(1, 8, 100), (3, 200, 300), (5, 1008, 90), (6, 1516, 64)];
    assert_eq!(places(&table), sectors.map(|(number, start, len)| (number, start * 512, len * 512)));
    assert_eq!(table.partitions[1].kind, "0x0c");
}

#[test]
fn gpt_with_both_sectors_and_from_its_copy() {
    for sector in [512, 1024, 2048, 4096] {
        let image = gpt(sector);
        let bytes = sector as u64;
        let good = table(&image).unwrap().unwrap();
        assert_eq!((good.scheme, u64::from(good.sector_bytes)), (Scheme::Gpt, bytes));
        assert_eq!(places(&good), [(1, 64 * bytes, 64 * bytes), (5, 128 * bytes, bytes)]);
        assert_eq!(good.partitions[0].kind, "0fc63daf-8483-4772-8e79-3d69d8477de4");
        assert_eq!(good.partitions[0].name, "ro", "without the bell");
        for damage in [sector, sector + 72, 2 * sector + 40] {
            let mut image = image.clone();
            image[damage] ^= 1;
            assert_eq!(table(&image).unwrap().as_ref(), Some(&good), "{damage}");
        }
    }
}

#[test]
fn what_is_no_table() {
    assert_eq!(table(&[]).unwrap(), None);
    assert_eq!(table(&vec![0; MIB]).unwrap(), None);
    assert_eq!(table(&[0x55; 511]).unwrap(), None);
    // A boot sector of a file system: the signature, and code for entries.
    let mut image = vec![0x33; MIB];
    put(&mut image, 510, &[0x55, 0xaa]);
    assert_eq!(table(&image).unwrap(), None);
    let error = run(find(&disk(&image), 1, None)).unwrap_err();
    assert!(matches!(error, PartitionError::NoTable), "{error}");
}

#[test]
fn what_there_is_instead() {
    let whole = disk(&mbr());
    let line = |number| run(find(&whole, number, None)).unwrap_err().to_string();
    assert_eq!(run(find(&whole, 6, None)).unwrap().start, 1516 * 512);
    assert_eq!(line(2), "has no partition 2; there are 1, 3, 5 and 6");
    assert_eq!(
        line(4),
        "has no partition 4; that is an extended one, which only holds others; there are 1, 3, 5 and 6"
    );
    let cut = disk(&mbr()[..1516 * 512 + 512]);
    let error = run(find(&cut, 6, None)).unwrap_err().to_string();
    assert!(error.contains("cut short"), "{error}");
}

#[test]
fn tables_that_make_no_sense() {
    let refused = |image: &[u8], words: &str| {
        let error = table(image).unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{error}");
    };
    let mut image = gpt(512);
    let copy = image.len() - 512;
    for (count, size, place, words) in [
        (u32::MAX, 128, 2, "makes no sense"),
        (4097, 128, 2, "makes no sense"),
        (128, 0, 2, "makes no sense"),
        (128, u32::MAX, 2, "makes no sense"),
        (128, 130, 2, "makes no sense"),
        (128, 128, usize::MAX / 512, "past the end"),
        (128, 128, 4090, "past the end"),
    ] {
        let mut head = vec![0; 2 * MIB];
        header(&mut head, 512, 1, 0, 1, 128);
        // By hand, since there are no such entries to sum up.
        let mut bytes = head[512..604].to_vec();
        put(&mut bytes, 72, &(place as u64).to_le_bytes());
        put(&mut bytes, 80, &count.to_le_bytes());
        put(&mut bytes, 84, &size.to_le_bytes());
        put(&mut bytes, 16, &[0; 4]);
        let sum = u32::try_from(gpt::crc32(&bytes)).unwrap();
        put(&mut bytes, 16, &sum.to_le_bytes());
        put(&mut image, 512, &bytes);
        image[copy] = 0;
        refused(&image, words);
    }
}

/// Tables as the kernel reads them (block/partitions/msdos.c).
#[test]
fn odd_tables_have_the_kernels_numbers() {
    let sectors = |image: &[u8], sector: u32| -> (Vec<(u32, u64, u64)>, Option<&'static str>) {
        let table = run(read(&disk(image), Some(sector))).unwrap().unwrap();
        assert_eq!(table.sector_bytes, sector);
        let bytes = u64::from(sector);
        (
            places(&table).into_iter().map(|(n, start, len)| (n, start / bytes, len / bytes)).collect(),
            table.flaw,
        )
    };
    // An empty first record takes no number.
    let mut image = mbr();
    entry(&mut image, 1000 * 512, 0, 0, 0, 0);
    assert_eq!(sectors(&image, 512), (vec![(1, 8, 100), (3, 200, 300), (5, 1516, 64)], None));
    // Type 0 with a length.
    let mut image = mbr();
    entry(&mut image, 0, 1, 0, 0, 2000);
    assert_eq!(sectors(&image, 512).0[1], (2, 0, 2000));
    // Two in one record; garbage in its third entry, and what is none in its fourth.
    let mut image = mbr();
    entry(&mut image, 1500 * 512, 1, 0x83, 100, 50);
    entry(&mut image, 1500 * 512, 2, 0x83, 10_000, 50);
    entry(&mut image, 1500 * 512, 3, 0x83, 200, 50);
    assert_eq!(sectors(&image, 512).0[2..], [(5, 1008, 90), (6, 1516, 64), (7, 1600, 50), (8, 1700, 50)]);
    // Two extended partitions.
    let mut image = mbr();
    entry(&mut image, 0, 1, 0x0f, 600, 100);
    entry(&mut image, 600 * 512, 0, 0x83, 2, 3);
    assert_eq!(
        sectors(&image, 512).0,
        [(1, 8, 100), (3, 200, 300), (5, 602, 3), (6, 1008, 90), (7, 1516, 64)]
    );
    // An image that ends before its extended partition, or within the chain; a chain that is a circle.
    let image = mbr();
    let (found, flaw) = sectors(&image[..900 * 512], 512);
    assert_eq!((found.len(), flaw.is_some()), (2, true));
    let line = run(find(&disk(&image[..900 * 512]), 5, None)).unwrap_err().to_string();
    assert!(line.contains("there are 1 and 3; the list") && line.contains("past the end"), "{line}");
    assert_eq!(run(find(&disk(&image[..900 * 512]), 3, None)).unwrap().start, 200 * 512);
    let (found, flaw) = sectors(&image[..1400 * 512], 512);
    assert_eq!((found.last(), flaw.is_some()), (Some(&(5, 1008, 90)), true));
    let mut image = mbr();
    entry(&mut image, 1500 * 512, 1, 0x05, 0, 600);
    let (found, flaw) = sectors(&image, 512);
    assert!(found.len() == 4 && flaw.unwrap().contains("circle"));
    let mut image = mbr();
    entry(&mut image, 1500 * 512, 1, 0x05, u32::MAX, 600);
    assert!(sectors(&image, 512).1.unwrap().contains("past the end"));
    // The same table on a device with larger sectors.
    let mut image = vec![0; 16 * MIB];
    entry(&mut image, 0, 0, 0x83, 8, 100);
    entry(&mut image, 0, 3, 0x05, 1000, 3000);
    entry(&mut image, 1000 * 4096, 0, 0x83, 8, 90);
    assert_eq!(sectors(&image, 4096).0, [(1, 8, 100), (5, 1008, 90)]);
    assert_eq!(sectors(&image, 512).0, [(1, 8, 100)]);
}

#[test]
fn odd_gpts() {
    // Without its copy; with another table's entries beside the protective one; with an entry that ends before it begins.
    let good = places(&table(&gpt(2048)).unwrap().unwrap());
    let mut image = gpt(2048);
    let len = image.len();
    image[len - 2048..].fill(0);
    entry(&mut image, 0, 1, 0x0c, 128, 64);
    assert_eq!(places(&table(&image).unwrap().unwrap()), good);
    assert!(run(read(&disk(&image), Some(512))).is_err(), "its sectors have another size");
    let mut image = gpt(512);
    put(&mut image, 1024 + 4 * 128 + 32, &200_u64.to_le_bytes());
    header(&mut image, 512, 1, 2, 128, 128);
    assert_eq!(places(&table(&image).unwrap().unwrap()).len(), 1);
    // 2048 entries, of which the last one is used.
    let mut image = gpt(512);
    let first: [u8; 128] = *image[1024..].first_chunk().unwrap();
    image[2048 * 512..].fill(0);
    let at = 2048 * 512 + 2047 * 128;
    image[at..at + 128].copy_from_slice(&first);
    header(&mut image, 512, 1, 2048, 2048, 128);
    assert_eq!(places(&table(&image).unwrap().unwrap()), [(2048, 64 * 512, 64 * 512)]);
}

/// Sets the sectors that partitions may use, in the first header.
fn usable(image: &mut [u8], first: u64, last: u64) {
    put(image, 512 + 40, &first.to_le_bytes());
    put(image, 512 + 48, &last.to_le_bytes());
    put(image, 512 + 16, &[0; 4]);
    let sum = u32::try_from(gpt::crc32(&image[512..604])).unwrap();
    put(image, 512 + 16, &sum.to_le_bytes());
}

/// What the kernel does not take is said.
#[test]
fn gpts_that_the_kernel_refuses() {
    let flaw = |image: &[u8]| table(image).unwrap().unwrap().flaw;
    let mut image = gpt(512);
    usable(&mut image, 34, 4062);
    assert_eq!(flaw(&image), None);
    // Its copy is cut off, which alone does not matter.
    assert_eq!(flaw(&image[..4063 * 512]), None);
    assert!(flaw(&image[..4062 * 512]).unwrap().contains("shorter than the disk"));
    assert_eq!(run(find(&disk(&image[..MIB]), 1, None)).unwrap().start, 64 * 512);
    entry(&mut image, 0, 0, 0xee, 63, u32::MAX);
    assert!(flaw(&image).unwrap().contains("protective entry is not at sector 1"));
    // The kernel takes another protective entry for it.
    entry(&mut image, 0, 3, 0xee, 1, 62);
    assert_eq!(flaw(&image), None);
    usable(&mut image, 4062, 34);
    let end = image.len();
    image[end - 512] = 0;
    let error = table(&image).unwrap_err().to_string();
    assert!(error.contains("usable sectors make no sense"), "{error}");
}

/// Whatever is in the tables: no panic (overflow is one in this build), no endless loop.
#[test]
fn random_damage_does_no_harm() {
    let mut random = Random::new(3);
    // Of each kind of table: read, read with a flaw, refused.
    let mut counts = [(0, 0, 0); 3];
    for round in 0..200 {
        let mut image = match round % 3 {
            0 => mbr(),
            1 => gpt(512),
            _ => gpt(4096),
        };
        for _ in 0..1 + random.below(6) {
            let place = usize::try_from(random.below(2)).unwrap();
            let area = [446..512, 1000 * 512 + 446..1000 * 512 + 512][place].clone();
            let at = area.start + usize::try_from(random.below(area.len() as u64)).unwrap();
            image[at] = u8::try_from(random.below(256)).unwrap();
        }
        // Valid checksums over random fields of a header.
        if round % 3 == 1 {
            let count = u32::try_from(random.below(2000)).unwrap();
            header(&mut image, 512, 1, usize::try_from(random.below(5000)).unwrap(), count, 128);
        }
        // A good copy stands in for a damaged GPT, so that every other disk has none.
        if round % 3 != 0 && round % 2 == 0 {
            let sector = if round % 3 == 1 { 512 } else { 4096 };
            let copy = image.len() - sector;
            image[copy..].fill(0);
        }
        let counts = &mut counts[round % 3];
        match table(&image) {
            Ok(Some(Table { flaw: None, .. })) => counts.0 += 1,
            Ok(Some(_)) => counts.1 += 1,
            Ok(None) | Err(_) => counts.2 += 1,
        }
    }
    let [mbr, gpt, large] = counts;
    assert!(mbr.0 > 5 && mbr.1 > 5 && mbr.2 > 5, "{counts:?}");
    assert!(gpt.0 > 5 && gpt.2 > 5 && large.0 > 5, "{counts:?}");
}
