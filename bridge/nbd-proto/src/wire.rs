//! Reading big-endian fields from bytes a peer controls, and bounding text that goes to one.

use bytes::Buf;

use crate::consts::MAX_NAME_BYTES;

/// Reads fields from the front of a slice. `None` means that the slice is too short; nothing is consumed then.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    #[inline]
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    #[inline]
    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.rest.try_get_u16().ok()
    }

    #[inline]
    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.rest.try_get_u32().ok()
    }

    #[inline]
    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.rest.try_get_u64().ok()
    }

    /// The next `len` bytes. `len` comes from the peer; it is compared, never added to anything.
    #[inline]
    pub(crate) fn bytes(&mut self, len: u32) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(usize::try_from(len).ok()?)?;
        self.rest = rest;
        Some(head)
    }

    /// Everything that is left.
    #[inline]
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

/// A string as the protocol defines it: at most [`MAX_NAME_BYTES`], UTF-8, no NUL (section "Conventions").
pub(crate) fn parse_string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > MAX_NAME_BYTES || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// As much of `text` as the protocol lets a string hold, cut before the first NUL and between characters.
///
/// An error text that quotes a 4096-byte name once overran both qemu's buffer and this limit (CVE-2020-10761).
pub(crate) fn bounded_text(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    let mut end = text.len().min(MAX_NAME_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Moves bytes from `rest` until `partial` has `need` of them; whether it has.
pub(crate) fn fill(partial: &mut Vec<u8>, rest: &mut &[u8], need: usize) -> bool {
    let (taken, left) = rest.split_at(need.saturating_sub(partial.len()).min(rest.len()));
    partial.extend_from_slice(taken);
    *rest = left;
    partial.len() >= need
}

/// The length of a string that [`bounded_text`] or the caller keeps far below 4 GiB.
pub(crate) fn len_u32(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_beyond_the_end_consumes_nothing() {
        let mut reader = Reader::new(&[1, 2, 3]);
        assert_eq!(reader.bytes(u32::MAX), None);
        assert_eq!(reader.u32(), None);
        assert_eq!(reader.rest(), [1, 2, 3]);
        assert_eq!(reader.bytes(3), Some(&[1, 2, 3][..]));
    }

    #[test]
    fn text_is_cut_between_characters() {
        let long = "é".repeat(3000);
        assert_eq!(bounded_text(&long).len(), 4096);
        let odd = format!("x{long}");
        assert_eq!(bounded_text(&odd).len(), 4095);
        assert_eq!(bounded_text("a\0b"), "a");
    }

    #[test]
    fn strings_follow_the_conventions() {
        assert_eq!(parse_string(b""), Some(""));
        assert_eq!(parse_string("disk-é".as_bytes()), Some("disk-é"));
        assert_eq!(parse_string(b"a\0b"), None);
        assert_eq!(parse_string(b"\xff"), None);
        assert!(parse_string(&[b'a'; 4096]).is_some());
        assert!(parse_string(&[b'a'; 4097]).is_none());
    }
}
