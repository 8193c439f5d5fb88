//! What is refused, with which kind of error, and that a refused request changes nothing.

use bridge::{Buffer, Capabilities, ErrorKind, Flags, Operation, Reply, Request, Result};

use super::fresh;
use crate::support::disk::PATHS;
use crate::support::{Disk, Kind};

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("it is refused").kind()
}

pub async fn past_the_end(disk: Disk) {
    let (size, image) = (disk.size(), fresh(&disk));
    let read_only = disk.kind == Kind::ReadOnly;
    let change = |otherwise| if read_only { ErrorKind::ReadOnly } else { otherwise };
    for (offset, len) in [(size, 1), (size - 1, 2), (0, image.len() + 1), (u64::MAX, 1), (u64::MAX - 1, 4096)]
    {
        for path in PATHS {
            assert_eq!(kind(disk.read(path, offset, len).await), ErrorKind::InvalidInput);
            let write = disk.write(path, offset, &vec![1; len], Flags::NONE).await;
            assert_eq!(kind(write), change(ErrorKind::NoSpace));
        }
    }
    for (offset, len) in
        [(size, 1), (size - 1, 2), (0, size + 1), (1, u64::MAX), (u64::MAX, u64::MAX), (size + 1, 0)]
    {
        assert_eq!(kind(disk.zero(offset, len, Flags::NONE).await), change(ErrorKind::NoSpace));
        assert_eq!(kind(disk.trim(offset, len, Flags::NONE).await), change(ErrorKind::InvalidInput));
        assert_eq!(kind(disk.cache(offset, len).await), ErrorKind::InvalidInput);
        assert_eq!(kind(disk.status(offset, len, Flags::NONE).await), ErrorKind::InvalidInput);
    }
    assert_eq!(kind(disk.status(0, 0, Flags::NONE).await), ErrorKind::InvalidInput);
    disk.assert_is(&image).await;
}

pub async fn a_read_only_disk_refuses_changes(disk: Disk) {
    let image = fresh(&disk);
    let geometry = disk.export.geometry();
    assert!(geometry.read_only());
    for lost in [Capabilities::TRIM, Capabilities::WRITE_ZEROES, Capabilities::FAST_ZERO, Capabilities::FUA] {
        assert!(!geometry.capabilities.contains(lost));
    }
    for (offset, len) in [(0, 1), (1, 100_000), (disk.size(), 0), (0, 0)] {
        for flags in [Flags::NONE, Flags::FUA, Flags::CONTINUED] {
            for path in PATHS {
                let data = vec![1; usize::try_from(len).unwrap()];
                assert_eq!(kind(disk.write(path, offset, &data, flags).await), ErrorKind::ReadOnly);
            }
            assert_eq!(kind(disk.trim(offset, len, flags).await), ErrorKind::ReadOnly);
            assert_eq!(kind(disk.zero(offset, len, flags).await), ErrorKind::ReadOnly);
        }
    }
    if geometry.capabilities.contains(Capabilities::FLUSH) {
        disk.flush().await.unwrap();
    }
    disk.cache(0, 4096).await.unwrap();
    disk.assert_is(&image).await;
}

pub async fn the_geometry_makes_sense(disk: Disk) {
    let geometry = disk.export.geometry();
    assert!(geometry.size > 6 << 20);
    assert!(geometry.min_block.is_power_of_two() && geometry.preferred_block.is_power_of_two());
    assert!(geometry.preferred_block >= geometry.min_block);
    let caps = geometry.capabilities;
    assert_eq!(caps.contains(Capabilities::READ_ONLY), disk.kind == Kind::ReadOnly);
    assert!(!caps.contains(Capabilities::FAST_ZERO) || caps.contains(Capabilities::WRITE_ZEROES));
    assert!(!caps.contains(Capabilities::MULTI_CONN) || caps.contains(Capabilities::FLUSH));
    assert_eq!(disk.export.geometry(), geometry, "nothing has happened");
    if disk.kind == Kind::ReadOnly {
        return;
    }
    // What is not advertised is refused, and what is advertised works.
    for (cap, operation) in [
        (Capabilities::FLUSH, Operation::Flush),
        (Capabilities::TRIM, Operation::Trim),
        (Capabilities::WRITE_ZEROES, Operation::WriteZeroes),
    ] {
        let result = disk.execute(Request::new(operation, 0, 0), None).await;
        assert_eq!(result.is_ok(), caps.contains(cap), "{operation:?}");
    }
}

pub async fn a_read_or_write_without_its_buffer_fails_alone(disk: Disk) {
    let image = fresh(&disk);
    let len = disk.export.geometry().min_block.max(512);
    let (count, len) = (usize::try_from(len).unwrap(), u64::from(len));
    assert_eq!(kind(disk.execute(Request::new(Operation::Read, 0, len), None).await), ErrorKind::Io);
    if disk.kind != Kind::ReadOnly {
        assert_eq!(kind(disk.execute(Request::new(Operation::Write, 0, len), None).await), ErrorKind::Io);
    }
    let read = disk.execute(Request::new(Operation::Read, 0, len), Some(Buffer::new(count))).await;
    assert!(matches!(read, Ok(Reply::Data(data)) if data[..] == image[..count]));
    disk.assert_is(&image).await;
}
