//! How long work tells how far it is. Who shows it, and how, is the caller's matter.

/// Somebody who wants to know.
pub(crate) trait Progress: Sync {
    /// What is being done now, as in "making the file system".
    fn step(&self, what: &str);

    /// So much of it is done, in bytes.
    fn bytes(&self, done: u64, of: u64);
}

/// Nobody.
pub(crate) struct Silent;

impl Progress for Silent {
    fn step(&self, _: &str) {}

    fn bytes(&self, _: u64, _: u64) {}
}
