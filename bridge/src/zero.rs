//! Finding out that bytes are all zero.

/// Whether all bytes are zero. Data that is not is mostly told by its first bytes.
pub fn is_zero(bytes: &[u8]) -> bool {
    const STEP: usize = 64;
    let head = bytes.get(..16).unwrap_or(bytes);
    if head.iter().any(|byte| *byte != 0) {
        return false;
    }
    let steps = bytes.chunks_exact(STEP);
    let rest = steps.remainder();
    // Each step is folded without a branch, so that the compiler can use wide registers.
    steps.into_iter().all(|step| step.iter().fold(0, |bits, byte| bits | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn every_place_counts() {
        for len in [0, 1, 15, 16, 17, 64, 65, 200] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len}");
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
