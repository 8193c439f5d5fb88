//! The removal of stale journals: those of another boot, and those whose image is gone.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, FlockOperation};

use super::header::Header;
use super::open_existing;

/// A journal with pending records whose image is not where it was stays for this long: the image may have been moved.
const MISSING_IMAGE: Duration = Duration::from_secs(3600);

/// Removes the stale journals of a folder. What cannot be judged or is in use stays.
pub(super) fn sweep(directory: &File, folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name.to_str().is_some_and(|name| name.starts_with("qcow2-") && name.ends_with(".journal")) {
            continue;
        }
        let Ok(file) = open_existing(directory, Path::new(&name)) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        if is_stale(&file) {
            // Another process may have been quicker.
            let _ = rustix::fs::unlinkat(directory, &name, AtFlags::empty());
        }
    }
}

fn is_stale(file: &File) -> bool {
    let Ok(Some(header)) = Header::read_any(file) else { return false };
    let age = file.metadata().ok().and_then(|found| found.modified().ok()?.elapsed().ok());
    // The image is looked at last: its file system may be one that does not answer.
    !header.identity.is_of_this_boot()
        || age.is_some_and(|age| age > MISSING_IMAGE) && !header.identity.is_image_there()
}
