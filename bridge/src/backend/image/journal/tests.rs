//! Tests of the journal as a file: what the next open finds, what is refused, and when it is given up.

use std::os::unix::fs::PermissionsExt;

use super::*;

struct World {
    folder: tempfile::TempDir,
    image: tempfile::NamedTempFile,
}

impl World {
    fn new() -> World {
        World { folder: tempfile::tempdir().unwrap(), image: tempfile::NamedTempFile::new().unwrap() }
    }

    fn open(&self) -> Result<(Journal, Left), String> {
        let identity = Identity::of(self.image.path(), self.image.as_file(), None, 16).unwrap();
        Journal::open(self.folder.path(), identity)
    }

    fn files(&self) -> usize {
        std::fs::read_dir(self.folder.path()).unwrap().count()
    }
}

fn record(first: u64) -> Record {
    Record { first, count: 1, change: Change::Map(first << 16) }
}

#[test]
fn records_are_found_by_the_next_open_until_a_reset() {
    let world = World::new();
    let (journal, found) = world.open().unwrap();
    assert_eq!(found, Left::Nothing);
    for n in 1..4 {
        journal.note(record(n)).unwrap();
    }
    let error = world.open().err().unwrap();
    assert!(error.contains("another process uses it"), "{error}");
    drop(journal);
    let (journal, found) = world.open().unwrap();
    assert_eq!(found, Left::Records(vec![record(1), record(2), record(3)]));
    journal.reset().unwrap();
    journal.note(record(9)).unwrap();
    drop(journal);
    let (journal, found) = world.open().unwrap();
    assert_eq!(found, Left::Records(vec![record(9)]));
    // A record that was written in part.
    journal.note(record(10)).unwrap();
    journal.file.write_all_at(&[0], RECORDS_AT + RECORD_BYTES + 27).unwrap();
    assert_eq!(journal.load().unwrap(), [record(9)]);
    journal.reset().unwrap();
    drop(journal);
    assert_eq!(world.files(), 0);
}

#[test]
fn a_full_journal_asks_for_a_commit_in_time() {
    let world = World::new();
    let (journal, _) = world.open().unwrap();
    let mut count = 0;
    while !journal.is_nearly_full() {
        journal.note(record(count)).unwrap();
        count += 1;
    }
    assert_eq!(count, RECORDS - RESERVE + 1);
    for n in count..RECORDS {
        journal.note(record(n)).unwrap();
    }
    assert_eq!(journal.note(record(0)).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(journal.load().unwrap().len() as u64, RECORDS);
    journal.reset().unwrap();
    journal.note(Record { first: 0, count: MAX_CLUSTERS + 1, change: Change::ZeroFree }).unwrap();
    assert!(journal.is_nearly_full());
}

#[test]
fn a_journal_that_was_given_up_has_room_and_keeps_nothing() {
    let world = World::new();
    let (mut journal, _) = world.open().unwrap();
    journal.note(record(1)).unwrap();
    journal.note(Record { first: 0, count: MAX_CLUSTERS, change: Change::ZeroFree }).unwrap();
    assert!(journal.is_nearly_full());
    let writable = std::mem::replace(&mut journal.file, File::open(&journal.path).unwrap());
    assert!(journal.reset().is_err());
    journal.file = writable;
    assert!(journal.give_up());
    assert!(!journal.is_nearly_full() && !journal.has_records());
    journal.note(record(2)).unwrap();
    journal.reset().unwrap();
    let (_, found) = world.open().unwrap();
    assert_eq!(found, Left::Nothing);
    drop(journal);
}

#[test]
fn places_that_will_not_do() {
    let world = World::new();
    let path = world.folder.path().to_owned();
    let name = {
        let (journal, _) = world.open().unwrap();
        journal.path.clone()
    };
    std::os::unix::fs::symlink("/dev/null", &name).unwrap();
    assert!(world.open().is_err(), "a link");
    std::fs::remove_file(&name).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &name, Mode::RUSR | Mode::WUSR).unwrap();
    assert!(world.open().is_err(), "a FIFO");
    std::fs::remove_file(&name).unwrap();
    std::fs::write(&name, "").unwrap();
    std::fs::set_permissions(&name, PermissionsExt::from_mode(0o644)).unwrap();
    assert!(world.open().is_err(), "a file that others can read");
    std::fs::remove_file(&name).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
    assert!(world.open().is_err(), "a folder that others can write to");
    assert_eq!(world.files(), 0);
}

#[test]
fn stale_journals_are_removed_and_others_stay() {
    let mut world = World::new();
    let (journal, _) = world.open().unwrap();
    journal.note(record(1)).unwrap();
    let old = journal.path.clone();
    drop(journal);
    world.image = tempfile::NamedTempFile::new().unwrap();
    drop(world.open().unwrap());
    assert!(old.exists(), "the image may have been moved a moment ago");
    let file = File::options().write(true).open(&old).unwrap();
    file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(7200)).unwrap();
    drop(file);
    drop(world.open().unwrap());
    assert!(!old.exists());
}
