//! Errors of durable writes that pass: each request is answered with its own errno, and the export stays usable. An
//! error that tells of an earlier write's loss is answered to the next flush, even if a durable write saw it first.

use nbd_proto::{Command, CommandFlags, NbdError, ReplyStyle};

use crate::support::mount::{Mount, missing};
use crate::support::{Loop, NO_FLAGS, Server, text};

const SIZE: u64 = 8 << 20;

/// A disk whose every third write fails.
fn failing(errno: &str) -> Mount {
    let fault = format!("op=write,errno={errno},error-every=3");
    Mount::image(SIZE, &["-f", "raw", "--fault", &fault])
}

#[test]
fn a_durable_write_that_fails_leaves_the_export_usable() {
    if missing("a_durable_write_that_fails_leaves_the_export_usable", &[]) {
        return;
    }
    let settings: [&[&str]; 5] = [
        &[],
        &["--aio", "threads"],
        &["--aio", "io_uring"],
        &["--cache", "none"],
        &["--cache", "directsync"],
    ];
    for (errno, expected) in [("ENOSPC", NbdError::NoSpc), ("EIO", NbdError::Io)] {
        for args in settings {
            let disk = failing(errno);
            let server = Server::serve(&[&[text(&disk.path), "-f", "raw"], args].concat());
            let mut client = server.client(ReplyStyle::Structured);
            let mut model = vec![0; 9 * 4096];
            let mut answers = Vec::new();
            for round in 0..9_u8 {
                let offset = usize::from(round) * 4096;
                let data = vec![round + 1; 4096];
                let answer = client.call_write(CommandFlags::FUA, offset as u64, &data);
                if answer.error.is_none() {
                    model[offset..offset + 4096].copy_from_slice(&data);
                }
                answers.push(answer.error);
                assert_eq!(client.call(Command::Flush, NO_FLAGS, 0, 0).error, None, "{errno} {args:?}");
            }
            // The server writes each request once: every third fails, and no retry hides or moves that.
            let every_third: Vec<_> = (1..10).map(|n| (n % 3 == 0).then_some(expected)).collect();
            assert_eq!(answers, every_third, "{errno} {args:?}: {}", server.log());
            assert!(disk.read(0, model.len()) == model, "{errno} {args:?}");
            client.disconnect();
            server.stop();
        }
    }
}

#[test]
fn a_loss_that_a_durable_write_saw_is_still_told_to_the_flush() {
    let test = "a_loss_that_a_durable_write_saw_is_still_told_to_the_flush";
    if missing(test, &["losetup"]) {
        return;
    }
    let fault = "op=write,errno=EIO,error-every=1,offset=4M,len=4k";
    let disk = Mount::image(SIZE, &["-f", "raw", "--fault", fault]);
    let Some(device) = Loop::new(&disk.path, &[]) else {
        eprintln!("SKIP: {test}: no loop devices here");
        return;
    };
    let server = Server::serve(&[device.0.as_str(), "-f", "raw"]);
    let mut client = server.client(ReplyStyle::Structured);
    // The page cache takes the write; its way to the disk fails, and that is told to another descriptor.
    client.write(4 << 20, &[1; 4096]);
    let other = std::fs::File::options().write(true).open(&device.0).unwrap();
    assert!(other.sync_all().is_err(), "the disk took the write");

    let first = client.call_write(CommandFlags::FUA, 0, &[2; 4096]);
    assert_eq!(first.error, Some(NbdError::Io), "its sync hears of the loss");
    let second = client.call_write(CommandFlags::FUA, 0, &[3; 4096]);
    assert_eq!(second.error, None, "a durable write answers for itself");
    for _ in 0..2 {
        let flush = client.call(Command::Flush, NO_FLAGS, 0, 0);
        assert_eq!(flush.error, Some(NbdError::Io), "an answered write is lost");
    }
    let third = client.call_write(CommandFlags::FUA, 0, &[4; 4096]);
    assert_eq!(third.error, Some(NbdError::Io), "a failed flush latches");
}
