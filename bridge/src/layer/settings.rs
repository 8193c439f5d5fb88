//! Settings of layers as text: `key=value,key=value`. Splits and reads values; which keys there are is each
//! layer's own.

/// Text that is no valid setting. One line that names the key and says what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SettingError(String);

impl SettingError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        SettingError(message.into())
    }
}

/// The pairs of `key=value,key=value`. Empty parts are skipped, so that a trailing comma does no harm.
pub(crate) fn pairs(text: &str) -> impl Iterator<Item = Result<(&str, &str), SettingError>> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(|part| match part.split_once('=') {
        Some((key, value)) => Ok((key.trim(), value.trim())),
        None => Err(SettingError::new(format!("`{part}` is no `key=value`"))),
    })
}

/// A plain whole number.
pub(crate) fn number(key: &str, value: &str) -> Result<u64, SettingError> {
    value.parse().map_err(|_| SettingError::new(format!("{key}: `{value}` is no whole number")))
}

/// A number of bytes: digits, and K, M, G or T (also as Ki, KB and KiB) for a power of 1024.
pub(crate) fn bytes(key: &str, value: &str) -> Result<u64, SettingError> {
    let (digits, unit) = value.split_at(value.bytes().take_while(u8::is_ascii_digit).count());
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => Some(0),
        "k" | "ki" | "kb" | "kib" => Some(10),
        "m" | "mi" | "mb" | "mib" => Some(20),
        "g" | "gi" | "gb" | "gib" => Some(30),
        "t" | "ti" | "tb" | "tib" => Some(40),
        _ => None,
    };
    let number = digits.parse::<u64>().ok();
    number.zip(shift).and_then(|(number, shift)| number.checked_mul(1 << shift)).ok_or_else(|| {
        SettingError::new(format!("{key}: `{value}` is no size (digits, then perhaps K, M, G or T)"))
    })
}

/// A share from 0 to 1.
pub(crate) fn share(key: &str, value: &str) -> Result<f64, SettingError> {
    value
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| SettingError::new(format!("{key}: `{value}` is no share from 0 to 1")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        for (text, value) in [
            ("0", 0),
            ("50M", 50 << 20),
            ("1t", 1 << 40),
            ("2Mi", 2 << 20),
            ("3GiB", 3 << 30),
            ("4kb", 4096),
            ("16777215T", 16_777_215 << 40),
        ] {
            assert_eq!(bytes("key", text), Ok(value));
        }
        for text in ["", "K", "1.5K", "-1", "16777216T", "1KK", "+1", "1i", "1é", "µK"] {
            let error = bytes("key", text).unwrap_err().to_string();
            assert!(error.starts_with("key: `") && !error.contains('\n'), "{error}");
        }
        assert_eq!(share("key", "0.25"), Ok(0.25));
        assert!(share("key", "1.1").is_err() && share("key", "NaN").is_err());
        let all: Vec<_> = pairs(" a=1, b = 2=3 ,,").collect();
        assert_eq!(all, [Ok(("a", "1")), Ok(("b", "2=3"))]);
        assert!(pairs("a").next().unwrap().is_err());
    }
}
