//! Which bytes of a read have come: a server may send them in any number of chunks and in any order, but each once,
//! and all of them. Without this account a server could leave holes in a buffer that held somebody else's data.

/// Most gaps kept account of. Real servers send in order and leave none.
const MAX_PIECES: usize = 1024;

/// The bytes that have come.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// All of them up to here.
    upto: usize,
    /// Further runs (start, end), in order, none touching another.
    rest: Vec<(usize, usize)>,
}

impl Coverage {
    /// Adds a run that is not empty. False where some of it had come already, or the account becomes too long.
    #[must_use]
    pub(super) fn add(&mut self, start: usize, len: usize) -> bool {
        let end = start + len;
        if self.rest.is_empty() && start == self.upto {
            self.upto = end;
            return true;
        }
        if start < self.upto {
            return false;
        }
        let at = self.rest.partition_point(|run| run.0 < start);
        let before_ends = if at == 0 { self.upto } else { self.rest[at - 1].1 };
        if before_ends > start || self.rest.get(at).is_some_and(|next| end > next.0) {
            return false;
        }
        let joins_next = self.rest.get(at).is_some_and(|next| next.0 == end);
        match (at > 0 && before_ends == start, joins_next) {
            (true, true) => {
                self.rest[at - 1].1 = self.rest[at].1;
                self.rest.remove(at);
            }
            (true, false) => self.rest[at - 1].1 = end,
            (false, true) => self.rest[at].0 = start,
            (false, false) => self.rest.insert(at, (start, end)),
        }
        if self.rest[0].0 == self.upto {
            self.upto = self.rest.remove(0).1;
        }
        self.rest.len() <= MAX_PIECES
    }

    /// Whether it is all of `len` bytes.
    pub(super) fn is_whole(&self, len: usize) -> bool {
        self.rest.is_empty() && self.upto == len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn any_order_is_whole_in_the_end_and_nothing_comes_twice() {
        let mut random = Random::new(1);
        for _ in 0..200 {
            let mut pieces: Vec<(usize, usize)> = Vec::new();
            let mut end = 0;
            while pieces.len() < 40 {
                let len = 1 + usize::try_from(random.below(5)).unwrap();
                pieces.push((end, len));
                end += len;
            }
            for n in (1..pieces.len()).rev() {
                pieces.swap(n, usize::try_from(random.below(n as u64 + 1)).unwrap());
            }
            let mut coverage = Coverage::default();
            for (n, &(start, len)) in pieces.iter().enumerate() {
                assert!(!coverage.is_whole(end));
                assert!(coverage.add(start, len), "{start} {len}");
                let (start, len) = pieces[usize::try_from(random.below(n as u64 + 1)).unwrap()];
                assert!(!Coverage { upto: coverage.upto, rest: coverage.rest.clone() }.add(start, len));
            }
            assert!(coverage.is_whole(end));
        }
    }

    #[test]
    fn overlaps_of_every_kind_are_seen() {
        let coverage = || Coverage { upto: 10, rest: vec![(20, 30), (40, 50)] };
        for (start, len) in [(0, 1), (9, 2), (15, 6), (15, 40), (25, 1), (29, 5), (35, 6), (35, 100), (49, 9)]
        {
            assert!(!coverage().add(start, len), "{start} {len}");
        }
        for (start, len) in [(10, 10), (10, 1), (15, 2), (30, 10), (31, 2), (50, 9), (99, 1)] {
            assert!(coverage().add(start, len), "{start} {len}");
        }
    }

    #[test]
    fn the_account_is_bounded() {
        let mut coverage = Coverage::default();
        let kept = (1..).take_while(|n| coverage.add(n * 2, 1)).count();
        assert_eq!(kept, MAX_PIECES);
    }
}
