//! Text that the operating system gives and takes, paths above all, in JSON: bytes that need not be UTF-8.
//!
//! What is UTF-8 becomes a string, and all else an array of its bytes, so that a reader gets back each byte.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A path, a source or a word of a command line. Its `Display` is for people, and shows what is not UTF-8 as `\u{fffd}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OsText(OsString);

/// Both forms of an [`OsText`] in JSON.
#[derive(Deserialize)]
#[serde(untagged)]
enum Form {
    Text(String),
    Bytes(Vec<u8>),
}

impl OsText {
    /// Returns the bytes as the operating system has them.
    pub(crate) fn as_os_str(&self) -> &OsStr {
        &self.0
    }

    /// Returns the bytes as a path.
    pub(crate) fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl From<OsText> for OsString {
    fn from(OsText(text): OsText) -> Self {
        text
    }
}

impl fmt::Display for OsText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl<T: AsRef<OsStr>> From<T> for OsText {
    fn from(text: T) -> Self {
        OsText(text.as_ref().to_owned())
    }
}

impl Serialize for OsText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => self.0.as_bytes().serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for OsText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Form::deserialize(deserializer).map(|form| {
            OsText(match form {
                Form::Text(text) => text.into(),
                Form::Bytes(bytes) => OsString::from_vec(bytes),
            })
        })
    }
}

/// The same form for a field that is a path: `#[serde(with = "os_text::path")]`.
pub(crate) mod path {
    use super::*;
    use std::path::PathBuf;

    pub(crate) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        OsText::from(path).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        OsText::deserialize(deserializer).map(|OsText(text)| PathBuf::from(text))
    }
}

/// The same form for a field that may hold a path: `#[serde(with = "os_text::option")]`.
pub(crate) mod option {
    use super::*;
    use std::path::PathBuf;

    pub(crate) fn serialize<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        path.as_ref().map(OsText::from).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        let path = Option::<OsText>::deserialize(deserializer)?;
        Ok(path.map(|OsText(text)| PathBuf::from(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_json() {
        for (bytes, json) in [
            (&b"/a b/\xc3\xa9"[..], "\"/a b/\u{e9}\""),
            (b"", "\"\""),
            (b"\xff/", "[255,47]"),
            (b"[255]", "\"[255]\""),
        ] {
            let text = OsText::from(OsStr::from_bytes(bytes));
            assert_eq!(serde_json::to_string(&text).unwrap(), json);
            let back: OsText = serde_json::from_str(json).unwrap();
            assert_eq!(back.as_os_str().as_bytes(), bytes);
        }
        assert!(serde_json::from_str::<OsText>("[256]").is_err());
        assert_eq!(OsText::from(OsStr::from_bytes(b"a\xff")).to_string(), "a\u{fffd}");
    }
}
