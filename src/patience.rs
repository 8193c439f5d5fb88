//! A moment's patience: what is in the way now may be gone without anybody doing anything about it.

use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// Whether something stays true for so long. It blocks meanwhile.
pub(crate) fn lasts(patience: Duration, is_so: impl Fn() -> bool) -> bool {
    let until = Instant::now() + patience;
    while is_so() {
        if Instant::now() >= until {
            return true;
        }
        std::thread::sleep(PAUSE);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn what_passes_does_not_last() {
        let looks = Cell::new(0);
        let twice = || looks.replace(looks.get() + 1) < 2;
        assert!(!lasts(Duration::from_secs(60), twice));
        assert!(lasts(Duration::from_millis(20), || true));
        assert!(!lasts(Duration::ZERO, || false));
    }
}
