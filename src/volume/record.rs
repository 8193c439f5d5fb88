//! What is known of a volume for good: `volume.json` in its folder.
//!
//! ```text
//!   { "schema": 1, "created": seconds since 1970, "options": { KEY: VALUE, ... }, "size": bytes, "fs": "ext4",
//!     "format": "raw", "limits": { KEY: number }, "formatted": true, "unclean": false, "grow_fs": false,
//!     "shares_uuid": false, "parent": "a@b", "pending": null }
//! ```
//!
//! Fields may be added within schema 1; a reader leaves out those it does not know. A file of a later schema is not read.

use std::fmt;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use bridge::layer::ThrottleConfig;
use serde::{Deserialize, Serialize};

use super::options::DiskFormat;
use super::{Error, FsKind, Name, Options, Origin, Result};
use crate::beneath::Folder;

/// The file in a volume's folder.
pub(super) const FILE: &str = "volume.json";

/// The version of the file's meaning.
const SCHEMA: u32 = 1;

/// A volume's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    schema: u32,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// As it was asked for when it was made.
    pub(crate) options: Options,
    /// In bytes, now.
    pub(crate) size: u64,
    pub(crate) fs: FsKind,
    /// None where the disk is a remote one.
    pub(crate) format: Option<DiskFormat>,
    /// Now; as text with `ThrottleConfig`'s keys.
    #[serde(with = "limits", default)]
    pub(crate) limits: ThrottleConfig,
    /// The file system is made, and durable: it is never made again.
    pub(crate) formatted: bool,
    /// It was mounted and not unmounted: it is checked before it is mounted again.
    #[serde(default)]
    pub(crate) unclean: bool,
    /// Its disk may be larger than its file system: that grows when it is next mounted.
    #[serde(default)]
    pub(crate) grow_fs: bool,
    /// Its file system has the UUID of the one that it is a copy of, and cannot be mounted beside it yet.
    #[serde(default)]
    pub(crate) shares_uuid: bool,
    /// What it is a copy of.
    #[serde(default)]
    pub(crate) parent: Option<Origin>,
    /// What was begun and is not done.
    #[serde(default)]
    pub(crate) pending: Option<Pending>,
}

/// A step that a crash can cut short. Whoever opens the pool next undoes or finishes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Pending {
    /// It is being made; nobody was told that it exists, and so it is undone.
    Create {
        /// mkfs has begun: what is on a remote disk since then is no stranger's.
        formatting: bool,
    },
    /// A snapshot is being made: it is whole, or there is none.
    Snapshot {
        /// Its name.
        name: Name,
    },
    /// Its disk is being made larger, from this many bytes: its size is what the disk's is then.
    Resize {
        /// What it was.
        from: u64,
    },
}

impl fmt::Display for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pending::Create { .. } => "being made",
            Pending::Snapshot { .. } => "a snapshot was being made",
            Pending::Resize { .. } => "being made larger",
        })
    }
}

impl Record {
    /// A volume that is about to be made.
    pub(crate) fn new(options: Options, size: u64, fs: FsKind, format: Option<DiskFormat>) -> Self {
        Record {
            schema: SCHEMA,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            size,
            fs,
            format,
            limits: options.limits,
            parent: options.from.clone(),
            options,
            formatted: false,
            unclean: false,
            grow_fs: false,
            shares_uuid: false,
            pending: Some(Pending::Create { formatting: false }),
        }
    }

    /// The name of the volume's disk in its folder; None for a remote one.
    pub(crate) fn disk_name(&self) -> Option<&'static str> {
        self.format.map(DiskFormat::disk_name)
    }

    /// Reads the record in a volume's folder. `name` is for people.
    ///
    /// # Errors
    /// [`Error::Broken`]: it is not there, damaged, or of a later version.
    pub(super) fn read(folder: &Folder, name: &Name) -> Result<Self> {
        let path = folder.path().join(FILE);
        let broken =
            |why: String| Error::Broken(format!("volume `{name}` is broken: {}: {why}", path.display()));
        let bytes = match folder.read(FILE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(broken("is missing".to_owned()));
            }
            other => other.map_err(|error| broken(error.to_string()))?,
        };
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        let version: Version = serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
        if version.schema != SCHEMA {
            return Err(broken(format!("has schema {}, and this version knows {SCHEMA}", version.schema)));
        }
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
        // A link in a copied folder could lead to any disk of this host.
        if let Some(disk) = record.disk_name()
            && let Err(error) = folder.file(disk)
            && error.kind() != io::ErrorKind::NotFound
        {
            let path = folder.path().join(disk);
            return Err(Error::Broken(format!("volume `{name}` is broken: {}: {error}", path.display())));
        }
        Ok(record)
    }

    /// Writes the record; it is durable when this returns.
    pub(super) fn write(&self, folder: &Folder) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(self).context("a record as JSON")?;
        folder
            .write(FILE, &bytes)
            .with_context(|| format!("{}: cannot write it", folder.path().join(FILE).display()))?;
        Ok(())
    }
}

/// Limits as a map of keys and numbers.
mod limits {
    use std::collections::BTreeMap;

    use bridge::layer::ThrottleConfig;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        limits: &ThrottleConfig,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(limits.settings())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<ThrottleConfig, D::Error> {
        let map = BTreeMap::<String, u64>::deserialize(deserializer)?;
        let text: Vec<_> = map.iter().map(|(key, value)| format!("{key}={value}")).collect();
        text.join(",").parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_its_file() {
        let home = tempfile::tempdir().unwrap();
        let folder = Folder::root(home.path()).unwrap();
        let name: Name = "a".parse().unwrap();
        let options = Options::parse([("size", "1G"), ("iops-total", "7")]).unwrap();
        let record = Record::new(options, 1 << 30, FsKind::Ext4, Some(DiskFormat::Raw));
        record.write(&folder).unwrap();
        assert_eq!(Record::read(&folder, &name).unwrap(), record);
        assert_eq!(record.limits.iops.total.avg, 7);
        let path = folder.path().join(FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        let broken = |content: &str, part: &str| {
            std::fs::write(&path, content).unwrap();
            let error = Record::read(&folder, &name).unwrap_err();
            assert!(matches!(error, Error::Broken(_)) && error.to_string().contains(part), "{error}");
            assert_eq!(error.to_string().lines().count(), 1);
        };
        for len in 0..text.len() {
            broken(&text[..len], "volume `a` is broken: ");
        }
        broken(&text.replace("\"schema\": 1", "\"schema\": 2"), "has schema 2, and this version knows 1");
        broken(&text.replace("\"size\": \"", "\"siez\": \""), "unknown option");
        std::fs::remove_file(&path).unwrap();
        let error = Record::read(&folder, &name).unwrap_err().to_string();
        assert!(error.contains("is missing"), "{error}");
        std::fs::write(&path, text.replace("\"schema\"", "\"later\": [1], \"schema\"")).unwrap();
        assert_eq!(Record::read(&folder, &name).unwrap(), record);
    }
}
