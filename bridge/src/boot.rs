//! The identity of the running kernel's boot.

/// A boot's number.
pub type BootId = [u8; 16];

/// The number of this boot; None where the kernel does not tell.
pub fn boot_id() -> Option<BootId> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let digits: String = text.trim().split('-').collect();
    Some(u128::from_str_radix(&digits, 16).ok()?.to_be_bytes())
}
