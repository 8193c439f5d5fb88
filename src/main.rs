//! nbdbridge.
fn main() {}
