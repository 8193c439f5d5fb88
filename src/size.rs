//! Sizes as people type them: `4096`, `64M`, `1.5G`, `10KiB`, `0x1000`. All units are powers of 1024, as in
//! qemu's tools, so that `K`, `Ki`, `KB` and `KiB` are the same.

use std::fmt;

/// The largest size: what the kernel's file offsets hold, and what NBD clients take.
pub(crate) const MAX_BYTES: u64 = i64::MAX as u64;

/// Why a text is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SizeError {
    /// Not a number with a known unit.
    NotASize,
    /// More than [`MAX_BYTES`].
    TooLarge,
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SizeError::NotASize => {
                "not a size; write bytes, or a number with K, M, G or T, as in 64M or 1.5G"
            }
            SizeError::TooLarge => "too large; the largest size is 8E less one byte",
        })
    }
}

impl std::error::Error for SizeError {}

/// Reads a size in bytes. A fraction of a byte is cut off.
///
/// # Errors
/// See [`SizeError`].
pub(crate) fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(SizeError::NotASize);
        }
        return limit(u64::from_str_radix(hex, 16).ok().map(u128::from));
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = unit_shift(unit).ok_or(SizeError::NotASize)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let decimal = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !decimal(fraction) || number.ends_with('.') {
        return Err(SizeError::NotASize);
    }
    let whole = whole.parse::<u64>().ok().map(u128::from);
    // More digits than these are less than a byte of the largest unit.
    let fraction = &fraction[..fraction.len().min(18)];
    let scale = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or(0));
    let part = fraction.parse::<u128>().unwrap_or(0);
    limit(whole.map(|whole| (whole << shift) + (part << shift) / scale))
}

fn limit(bytes: Option<u128>) -> Result<u64, SizeError> {
    let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok()).ok_or(SizeError::TooLarge)?;
    if bytes > MAX_BYTES { Err(SizeError::TooLarge) } else { Ok(bytes) }
}

fn unit_shift(unit: &str) -> Option<u32> {
    let unit = unit.to_ascii_lowercase();
    let letter = match unit.as_str() {
        "" | "b" => return Some(0),
        _ => {
            let unit = unit.strip_suffix('b').unwrap_or(&unit);
            unit.strip_suffix('i').unwrap_or(unit)
        }
    };
    match letter {
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        "t" => Some(40),
        "p" => Some(50),
        "e" => Some(60),
        _ => None,
    }
}

/// A size that a command gives: a number of bytes, or `+SIZE` for bytes beyond the present size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewSize {
    /// The size in bytes.
    Exactly(u64),
    /// Bytes to add.
    More(u64),
}

impl NewSize {
    /// Reads `64M` or `+10M`.
    ///
    /// # Errors
    /// See [`SizeError`].
    pub(crate) fn parse(text: &str) -> Result<Self, SizeError> {
        match text.trim().strip_prefix('+') {
            Some(more) => parse(more).map(NewSize::More),
            None => parse(text).map(NewSize::Exactly),
        }
    }

    /// Returns the size in bytes that follows from the present one.
    ///
    /// # Errors
    /// `TooLarge` where the sum exceeds [`MAX_BYTES`].
    pub(crate) fn after(self, present: u64) -> Result<u64, SizeError> {
        match self {
            NewSize::Exactly(size) => Ok(size),
            NewSize::More(more) => limit(Some(u128::from(present) + u128::from(more))),
        }
    }
}

/// A size for people: `64 MiB`, `1.5 GiB`, `1000 bytes`.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut shift = 0;
    let mut name = "bytes";
    for unit in UNITS {
        if bytes >> (shift + 10) == 0 {
            break;
        }
        shift += 10;
        name = unit;
    }
    let whole = bytes >> shift;
    let tenths = (bytes - (whole << shift)) / ((1_u64 << shift) / 10).max(1);
    match tenths.min(9) {
        _ if shift == 0 => format!("{bytes} bytes"),
        0 => format!("{whole} {name}"),
        tenths => format!("{whole}.{tenths} {name}"),
    }
}

/// A size for people, with its bytes where that says more: `64 MiB (67108864 bytes)`.
pub(crate) fn full(bytes: u64) -> String {
    if bytes < 1 << 10 { human(bytes) } else { format!("{} ({bytes} bytes)", human(bytes)) }
}

/// The same where [`human`] is exact, else in bytes: for what is a setting.
pub(crate) fn exact(bytes: u64) -> String {
    let text = human(bytes);
    if parse(&text.replace(' ', "")) == Ok(bytes) { text } else { format!("{bytes} bytes") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_that_people_type() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096b", 4096),
            ("1k", 1 << 10),
            ("1KB", 1 << 10),
            ("1KiB", 1 << 10),
            ("1Ki", 1 << 10),
            ("64mi", 64 << 20),
            ("64M", 64 << 20),
            ("1.5G", 3 << 29),
            ("0.5t", 1 << 39),
            ("2TiB", 2 << 40),
            ("7E", 7 << 60),
            ("0.001K", 1),
            ("0x1000", 4096),
            (" 1M ", 1 << 20),
            ("9223372036854775807", MAX_BYTES),
            ("1.0000000000000000000000000000000000000001G", 1 << 30),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn texts_that_are_no_size() {
        let no_size = [
            "", "x", "M", "-1", "+1", "1.", ".5G", "1..5G", "1.2.3", "1 G", "1GG", "1i", "1iB", "1Gii",
            "1Kib/s", "0x", "0x+1", "1e3", "٣",
        ];
        for text in no_size {
            assert_eq!(parse(text), Err(SizeError::NotASize), "{text}");
        }
        for text in ["8E", "9223372036854775808", "99999999999999999999", "99999999T", "0xffffffffffffffffff"]
        {
            assert_eq!(parse(text), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn sizes_that_add_to_the_present_one() {
        assert_eq!(NewSize::parse("64M").unwrap().after(1), Ok(64 << 20));
        assert_eq!(NewSize::parse("+10M").unwrap().after(1 << 20), Ok(11 << 20));
        assert_eq!(NewSize::parse(" +1").unwrap().after(MAX_BYTES), Err(SizeError::TooLarge));
        for text in ["", "+", "++1", "-1", "+-1"] {
            assert_eq!(NewSize::parse(text), Err(SizeError::NotASize), "{text}");
        }
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1000, "1000 bytes"),
            (1 << 10, "1 KiB"),
            (3 << 29, "1.5 GiB"),
            ((1 << 30) - 1, "1023.9 MiB"),
            (MAX_BYTES, "7.9 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
        for (bytes, text) in [(512, "512 bytes"), (3000, "3000 bytes"), (4096, "4 KiB"), (3 << 19, "1.5 MiB")]
        {
            assert_eq!(exact(bytes), text);
        }
        assert_eq!((full(1023), full(3 << 9)), ("1023 bytes".to_owned(), "1.5 KiB (1536 bytes)".to_owned()));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,24}") {
            let _ = parse(&text);
        }

        #[test]
        fn plain_bytes_come_back(bytes in 0..=MAX_BYTES) {
            prop_assert_eq!(parse(&bytes.to_string()), Ok(bytes));
            prop_assert_eq!(parse(&format!("{bytes:#x}")), Ok(bytes));
            let _ = human(bytes);
        }
    }
}
