//! What a volume is asked to be: `KEY=VALUE` pairs, as `-o` gives them by hand and Docker in `Opts`, made into typed
//! values. Nothing here looks at a disk.

use std::collections::BTreeMap;
use std::fmt;

use bridge::layer::ThrottleConfig;
use nbd_proto::uri::Uri;
use serde::{Deserialize, Serialize};

use super::{Error, Origin, Result};
use crate::size;

/// Every key, for people.
const KNOWN: &str = "size, fs, format, provision, mkfs-options, mount-options, uid, gid, mode, read-only, door, from, \
                     source, iops-total, iops-read, iops-write, bps-total, bps-read, bps-write (each also with -max and \
                     -max-length), iops-size";

/// The longest value in bytes.
const MAX_VALUE: usize = 4096;

/// A file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FsKind {
    Ext4,
    Xfs,
    Btrfs,
    /// None: whoever mounts the volume gets a block device.
    None,
}

/// What becomes of the space that nobody has written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Provision {
    /// It is taken as the volume is written.
    Thin,
    /// It is reserved when the volume is made, and stays so.
    Thick,
}

/// How the kernel gets at the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DoorChoice {
    /// The best that this host has.
    Auto,
    /// ublk.
    Ublk,
    /// A loop device over a FUSE file.
    Fuse,
}

/// The format of a volume's own disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DiskFormat {
    Raw,
    Qcow2,
}

impl DiskFormat {
    /// The name of such a disk in its folder.
    pub(crate) fn disk_name(self) -> &'static str {
        match self {
            DiskFormat::Raw => "disk.raw",
            DiskFormat::Qcow2 => "disk.qcow2",
        }
    }
}

/// What a volume is asked to be. As text it is the pairs that make it; equal options have equal text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub(crate) struct Options {
    /// In bytes; None for the origin's, the remote's, or the pool's default.
    pub(crate) size: Option<u64>,
    /// None for the origin's, what the remote has, or ext4.
    pub(crate) fs: Option<FsKind>,
    /// None for the origin's, or raw.
    pub(crate) format: Option<DiskFormat>,
    pub(crate) provision: Provision,
    /// Words for mkfs.
    pub(crate) mkfs: Vec<String>,
    /// Separated by commas, as mount(8) takes them.
    pub(crate) mount: String,
    /// Owner, group and mode of the root folder; None for what mkfs makes.
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) mode: Option<u32>,
    /// Nobody may change anything.
    pub(crate) read_only: bool,
    pub(crate) door: DoorChoice,
    pub(crate) limits: ThrottleConfig,
    /// A copy of this.
    pub(crate) from: Option<Origin>,
    /// A remote export, instead of a disk of its own.
    pub(crate) source: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            size: None,
            fs: None,
            format: None,
            provision: Provision::Thin,
            mkfs: Vec::new(),
            mount: String::new(),
            uid: None,
            gid: None,
            mode: None,
            read_only: false,
            door: DoorChoice::Auto,
            limits: ThrottleConfig::default(),
            from: None,
            source: None,
        }
    }
}

impl Options {
    /// Reads pairs. `timeout`, with which podman is told how long to wait for a plugin, is nothing to us.
    ///
    /// # Errors
    /// A line that names the key, and for an unknown one those that there are.
    pub(crate) fn parse<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let mut options = Options::default();
        let mut limits = Vec::new();
        for (key, value) in pairs {
            let value = value.trim();
            if value.len() > MAX_VALUE || value.contains(|c: char| c.is_control()) {
                return Err(Error::Usage(format!(
                    "option {key}: longer than {MAX_VALUE} bytes, or with control characters"
                )));
            }
            if key.starts_with("iops") || key.starts_with("bps") {
                limits.push(format!("{key}={value}"));
            } else if key != "timeout" {
                options.set(key, value)?;
            }
        }
        options.limits = limits.join(",").parse().map_err(|error| Error::Usage(format!("{error}")))?;
        options.check()?;
        Ok(options)
    }

    /// The pairs that make these options; what is not said is left out.
    pub(crate) fn pairs(&self) -> BTreeMap<String, String> {
        let mut pairs = BTreeMap::new();
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                pairs.insert(key.to_owned(), value);
            }
        };
        put("size", self.size.map(|size| size.to_string()));
        put("fs", self.fs.map(|fs| fs.to_string()));
        put("format", self.format.map(|format| format.to_string()));
        put("provision", (self.provision == Provision::Thick).then(|| "thick".to_owned()));
        put("mkfs-options", (!self.mkfs.is_empty()).then(|| self.mkfs.join(" ")));
        put("mount-options", (!self.mount.is_empty()).then(|| self.mount.clone()));
        put("uid", self.uid.map(|uid| uid.to_string()));
        put("gid", self.gid.map(|gid| gid.to_string()));
        put("mode", self.mode.map(|mode| format!("{mode:04o}")));
        put("read-only", self.read_only.then(|| "true".to_owned()));
        put("door", (self.door != DoorChoice::Auto).then(|| self.door.to_string()));
        put("from", self.from.as_ref().map(Origin::to_string));
        put("source", self.source.clone());
        pairs.extend(self.limits.settings().into_iter().map(|(key, value)| (key, value.to_string())));
        pairs
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let wrong = |what: &str| Error::Usage(format!("option {key}={value}: {what}"));
        match key {
            "size" => {
                let bytes = size::parse(value).map_err(|error| wrong(&error.to_string()))?;
                if bytes == 0 {
                    return Err(wrong("a volume of no size holds nothing; as in size=10G"));
                }
                if bytes % 4096 != 0 {
                    return Err(wrong("must be a multiple of 4096 bytes"));
                }
                self.size = Some(bytes);
            }
            "fs" => {
                self.fs = Some(match value {
                    "ext4" => FsKind::Ext4,
                    "xfs" => FsKind::Xfs,
                    "btrfs" => FsKind::Btrfs,
                    "none" => FsKind::None,
                    _ => return Err(wrong("there are ext4, xfs, btrfs and none")),
                });
            }
            "format" => {
                self.format = Some(match value {
                    "raw" => DiskFormat::Raw,
                    "qcow2" => DiskFormat::Qcow2,
                    _ => return Err(wrong("there are raw and qcow2")),
                });
            }
            "provision" => {
                self.provision = match value {
                    "thin" => Provision::Thin,
                    "thick" => Provision::Thick,
                    _ => return Err(wrong("there are thin and thick")),
                };
            }
            "mkfs-options" => {
                // Which of them are allowed depends on the file system, see `allowed`.
                self.mkfs = value.split_whitespace().map(str::to_owned).collect();
            }
            "mount-options" => {
                if value.split(',').any(|option| option.trim() == "ro") {
                    return Err(wrong("a volume that nobody can change is one with read-only=true"));
                }
                self.mount = value.to_owned();
            }
            "uid" => self.uid = Some(value.parse().map_err(|_| wrong("a user's number is wanted"))?),
            "gid" => self.gid = Some(value.parse().map_err(|_| wrong("a group's number is wanted"))?),
            "mode" => {
                let mode = u32::from_str_radix(value, 8).ok().filter(|mode| *mode <= 0o7777);
                self.mode = Some(mode.ok_or_else(|| wrong("octal digits are wanted, as in 0750"))?);
            }
            "read-only" => {
                self.read_only = match value {
                    "" | "true" | "yes" | "on" | "1" => true,
                    "false" | "no" | "off" | "0" => false,
                    _ => return Err(wrong("true or false")),
                };
            }
            "door" => {
                self.door = match value {
                    "auto" => DoorChoice::Auto,
                    "ublk" => DoorChoice::Ublk,
                    "fuse" => DoorChoice::Fuse,
                    _ => return Err(wrong("there are auto, ublk and fuse")),
                };
            }
            "from" => self.from = Some(value.parse()?),
            "source" => {
                if !Uri::is_meant(value) {
                    return Err(wrong(
                        "a remote export is wanted, as in nbd://HOST/NAME or nbd+unix:///NAME?socket=PATH",
                    ));
                }
                crate::cli::parse_source(value.into()).map_err(|error| wrong(&error))?;
                self.source = Some(value.to_owned());
            }
            _ => {
                let key: String = key.chars().take(64).flat_map(char::escape_debug).collect();
                return Err(Error::Usage(format!("unknown option `{key}`; there are {KNOWN}")));
            }
        }
        Ok(())
    }

    /// What each key by itself cannot tell.
    fn check(&self) -> Result<()> {
        let refuse = |line: &str| Err(Error::Usage(line.to_owned()));
        if self.source.is_some() {
            if self.from.is_some() {
                return refuse("a volume is either from another one or has a remote source, not both");
            }
            if self.size.is_some() || self.format.is_some() || self.provision == Provision::Thick {
                return refuse(
                    "a remote source has its size and space: leave out size, format and provision",
                );
            }
        }
        if self.read_only && self.source.is_none() && self.from.is_none() {
            return refuse(
                "a read-only volume that is made empty stays so: leave out read-only, or give it a source",
            );
        }
        if self.format == Some(DiskFormat::Qcow2) && self.provision == Provision::Thick {
            return refuse(
                "provision=thick needs format=raw: a qcow2 image takes its space as it is written",
            );
        }
        if self.from.is_some() && (self.fs.is_some() || !self.mkfs.is_empty()) {
            return refuse("a copy has the file system of its origin: leave out fs and mkfs-options");
        }
        if self.fs == Some(FsKind::None) {
            let says = !self.mkfs.is_empty() || !self.mount.is_empty();
            if says || self.uid.is_some() || self.gid.is_some() || self.mode.is_some() {
                return refuse("with fs=none there is no file system for options, an owner or a mode");
            }
        }
        Ok(())
    }
}

impl TryFrom<BTreeMap<String, String>> for Options {
    type Error = Error;

    fn try_from(pairs: BTreeMap<String, String>) -> Result<Self> {
        Options::parse(pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())))
    }
}

impl From<Options> for BTreeMap<String, String> {
    fn from(options: Options) -> Self {
        options.pairs()
    }
}

macro_rules! lowercase_names {
    ($type:ty: $($variant:ident $name:literal),+) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $name),+ })
            }
        }
    };
}

lowercase_names!(FsKind: Ext4 "ext4", Xfs "xfs", Btrfs "btrfs", None "none");
lowercase_names!(DoorChoice: Auto "auto", Ublk "ublk", Fuse "fuse");
lowercase_names!(DiskFormat: Raw "raw", Qcow2 "qcow2");
lowercase_names!(Provision: Thin "thin", Thick "thick");

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        Options::parse(
            line.split(';')
                .filter(|word| !word.is_empty())
                .map(|word| word.split_once('=').unwrap_or((word, ""))),
        )
    }

    #[test]
    fn pairs_and_back() {
        for line in [
            "",
            "size=10G",
            "size=1G;fs=xfs;format=qcow2;mkfs-options=-m  reflink=1;mount-options=noatime,discard;uid=7;gid=8;mode=750",
            "size=1G;provision=thick;door=fuse;iops-total=100;bps-read=1M;bps-read-max=2M",
            "from=a@b;size=2G;read-only",
            "source=nbd://h/x;fs=none",
        ] {
            let options = parse(line).unwrap();
            let pairs = options.pairs();
            assert_eq!(Options::try_from(pairs.clone()).unwrap(), options, "{line}");
            let text = serde_json::to_string(&options).unwrap();
            assert_eq!(serde_json::from_str::<Options>(&text).unwrap(), options, "{line}");
            assert!(!pairs.contains_key("door") || line.contains("door"), "what is not said is left out");
        }
        assert_eq!(parse("timeout=10").unwrap(), Options::default());
        assert_eq!(parse("size=1024M;mode=0755").unwrap(), parse("mode=755;size=1G").unwrap());
        assert_eq!(parse("mkfs-options=-m 0 -q").unwrap().mkfs, ["-m", "0", "-q"]);
    }

    #[test]
    fn refusals_name_the_key() {
        for (line, part) in [
            ("siez=1G", "unknown option `siez`; there are size, fs,"),
            ("size=0", "size=0: a volume of no size"),
            ("size=1X", "size=1X: not a size"),
            ("size=1000", "multiple of 4096"),
            ("fs=zfs", "there are ext4"),
            ("format=vmdk", "there are raw"),
            ("provision=fat", "there are thin"),
            ("uid=root", "a user's number"),
            ("mode=999", "octal"),
            ("mode=10000", "octal"),
            ("read-only=maybe", "true or false"),
            ("door=net", "there are auto"),
            ("iops-totl=1", "unknown throttle key"),
            ("iops-total=1;iops-read=1", "iops-total excludes"),
            ("source=/dev/sda", "a remote export"),
            ("source=nbd://h/x;size=1G", "leave out size"),
            ("source=nbd://h/x;from=a", "not both"),
            ("from=../x", "is no name"),
            ("from=a;fs=xfs", "leave out fs"),
            ("format=qcow2;provision=thick", "format=raw"),
            ("read-only=true", "stays so"),
            ("fs=none;mode=0700", "no file system for"),
            ("mount-options=a\nb", "control characters"),
            ("mount-options=noatime, ro", "read-only=true"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(part), "{line}: {error}");
            assert_eq!(error.lines().count(), 1);
        }
    }
}
