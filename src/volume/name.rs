//! Names of volumes and snapshots: what Docker allows, so that none of them leads out of its pool's folder.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Error;

/// The longest name in bytes: the longest that a file can have.
const MAX_BYTES: usize = 255;

/// A name: a letter or digit, then letters, digits, `_`, `.` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Name(String);

impl Name {
    /// The text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = |why: &str| {
            let shown: String = text.chars().take(64).flat_map(char::escape_debug).collect();
            Err(Error::Usage(format!("`{shown}` is no name for a volume: {why}")))
        };
        if text.len() > MAX_BYTES {
            return refuse(&format!("it is longer than {MAX_BYTES} bytes"));
        }
        let mut bytes = text.bytes();
        match bytes.next() {
            None => return refuse("it is empty"),
            Some(first) if !first.is_ascii_alphanumeric() => {
                return refuse("it must begin with a letter or a digit");
            }
            Some(_) => {}
        }
        if !bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-')) {
            return refuse("only letters, digits, `_`, `.` and `-` make one");
        }
        Ok(Name(text.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl AsRef<Path> for Name {
    fn as_ref(&self) -> &Path {
        Path::new(self.as_str())
    }
}

/// What a volume is made from: `VOLUME`, or `VOLUME@SNAPSHOT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Origin {
    pub(crate) volume: Name,
    pub(crate) snapshot: Option<Name>,
}

impl FromStr for Origin {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.split_once('@') {
            None => Ok(Origin { volume: text.parse()?, snapshot: None }),
            Some((volume, snapshot)) => {
                Ok(Origin { volume: volume.parse()?, snapshot: Some(snapshot.parse()?) })
            }
        }
    }
}

impl TryFrom<String> for Origin {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Origin> for String {
    fn from(origin: Origin) -> Self {
        origin.to_string()
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.snapshot {
            None => self.volume.fmt(f),
            Some(snapshot) => write!(f, "{}@{snapshot}", self.volume),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_and_are_not() {
        for text in ["a", "0", "data_1.2-3", "a..b", &"x".repeat(255)] {
            assert_eq!(text.parse::<Name>().unwrap().as_str(), text);
        }
        let long = "x".repeat(256);
        for text in ["", ".", "..", "../x", "a/b", "-a", "_a", ".a", "a b", "a\n", "ä", "a@b", "a\0", &long]
        {
            let error = text.parse::<Name>().unwrap_err();
            assert!(matches!(error, Error::Usage(_)), "{text:?}");
            assert_eq!(error.to_string().lines().count(), 1, "{text:?}");
        }
    }

    #[test]
    fn origins() {
        let plain: Origin = "a".parse().unwrap();
        assert_eq!((plain.volume.as_str(), &plain.snapshot), ("a", &None));
        let snapshot: Origin = "a@b".parse().unwrap();
        assert_eq!(snapshot.to_string(), "a@b");
        for text in ["", "@", "a@", "@b", "a@b@c", "a/b"] {
            assert!(text.parse::<Origin>().is_err(), "{text}");
        }
    }
}
