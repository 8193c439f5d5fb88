//! Which format an image has, told from its first sector: for images whose format nobody named, and for what clients
//! write there ([`super::guard`]).

use std::fmt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;

use crate::OpenError;

/// What is looked at, in bytes: QEMU's BLOCK_PROBE_BUF_SIZE.
pub(super) const PROBE_BYTES: usize = 512;

/// An image format that can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's, versions 2 and 3.
    Qcow2,
    /// VMware's, where a descriptor names plain extents; read-only.
    Vmdk,
}

impl ImageFormat {
    /// The name that `-f` takes, which is qemu-img's.
    pub fn name(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vmdk => "vmdk",
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ImageFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" | "file" | "host_device" => Ok(ImageFormat::Raw),
            "qcow2" => Ok(ImageFormat::Qcow2),
            "vmdk" => Ok(ImageFormat::Vmdk),
            other => match FORMATS.iter().find(|known| known.name == other) {
                Some(known) => Err(way_out(known.name)),
                None => Err("formats are raw, qcow2 and vmdk".into()),
            },
        }
    }
}

/// How a format is known.
struct Signature {
    name: &'static str,
    at: usize,
    magic: &'static [u8],
    format: Option<ImageFormat>,
}

const fn foreign(name: &'static str, at: usize, magic: &'static [u8]) -> Signature {
    Signature { name, at, magic, format: None }
}

/// All that qemu would take for something else than raw, as far as it shows in the first sector.
const FORMATS: &[Signature] = &[
    Signature { name: "qcow2", at: 0, magic: b"QFI\xfb", format: Some(ImageFormat::Qcow2) },
    Signature { name: "vmdk", at: 0, magic: b"KDMV", format: Some(ImageFormat::Vmdk) },
    Signature { name: "vmdk", at: 0, magic: b"COWD", format: Some(ImageFormat::Vmdk) },
    Signature { name: "vmdk", at: 0, magic: DESCRIPTOR, format: Some(ImageFormat::Vmdk) },
    foreign("vhdx", 0, b"vhdxfile"),
    foreign("vpc", 0, b"conectix"),
    foreign("vdi", 64, b"\x7f\x10\xda\xbe"),
    foreign("qed", 0, b"QED\0"),
    foreign("luks", 0, b"LUKS\xba\xbe"),
    foreign("parallels", 0, b"WithoutFreeSpace"),
    foreign("parallels", 0, b"WithouFreSpacExt"),
    foreign("bochs", 0, b"Bochs Virtual HD Image\0"),
    foreign("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
];

const DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";

/// What a first sector looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guess {
    Known(ImageFormat),
    /// A format that cannot be opened here.
    Foreign(&'static str),
}

impl Guess {
    pub(super) fn name(self) -> &'static str {
        match self {
            Guess::Known(format) => format.name(),
            Guess::Foreign(name) => name,
        }
    }
}

/// Guesses from the first bytes of an image.
pub(super) fn guess(sector: &[u8]) -> Guess {
    let is = |known: &&Signature| sector.get(known.at..).is_some_and(|rest| rest.starts_with(known.magic));
    match FORMATS.iter().find(is) {
        Some(Signature { format: Some(format), .. }) => Guess::Known(*format),
        Some(Signature { name, .. }) => Guess::Foreign(name),
        None if is_descriptor(sector) => Guess::Known(ImageFormat::Vmdk),
        None => Guess::Known(ImageFormat::Raw),
    }
}

/// QEMU's rule for VMDK descriptors: comments and empty lines, then a version.
fn is_descriptor(sector: &[u8]) -> bool {
    if !sector.starts_with(b"#") {
        return false;
    }
    let mut lines = sector.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    first.is_some_and(|line| [b"version=1".as_slice(), b"version=2", b"version=3"].contains(&line))
}

/// The format of the image at `path`.
///
/// # Errors
/// One line: it cannot be read, or has a format that cannot be opened here.
pub fn probe(path: &Path) -> Result<ImageFormat, OpenError> {
    let mut sector = [0; PROBE_BYTES];
    let count = read_first(path, &mut sector)?;
    match guess(&sector[..count]) {
        Guess::Known(format) => Ok(format),
        Guess::Foreign(name) => Err(OpenError::Unsupported {
            path: path.to_owned(),
            reason: format!(
                "looks like a {name} image: {}; or -f raw, to take its bytes as they are",
                way_out(name)
            ),
        }),
    }
}

fn way_out(name: &str) -> String {
    format!("{name} is not supported (`qemu-img convert -f {name} -O qcow2 OLD NEW` makes one that is)")
}

/// Reads the first bytes of a plain file or device. Anything else is left to whoever opens it, and says what it is.
fn read_first(path: &Path, buf: &mut [u8]) -> Result<usize, OpenError> {
    use std::os::unix::fs::FileTypeExt;
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(OpenError::NotFound(path.to_owned()));
        }
        Err(source) => {
            return Err(OpenError::Os { path: path.to_owned(), action: "cannot look at it", error: source });
        }
    };
    if !kind.is_file() && !kind.is_block_device() {
        return Ok(0);
    }
    // What cannot be opened is said better by whoever opens it for good.
    let Ok(file) = std::fs::File::open(path) else { return Ok(0) };
    let mut filled = 0;
    while filled < buf.len() {
        match file.read_at(&mut buf[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(OpenError::Os { path: path.to_owned(), action: "cannot read it", error: source });
            }
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_apart() {
        let sector = |at: usize, magic: &[u8]| {
            let mut sector = [0; PROBE_BYTES];
            sector[at..at + magic.len()].copy_from_slice(magic);
            guess(&sector).name()
        };
        for known in FORMATS {
            assert_eq!(sector(known.at, known.magic), known.name);
            assert_eq!(sector(known.at + 1, known.magic), "raw");
        }
        assert_eq!(sector(0, b"# a comment\n\n version=1 \n"), "vmdk");
        assert_eq!(sector(0, b"# a comment\n#version=1\n"), "raw");
        assert_eq!(guess(b""), Guess::Known(ImageFormat::Raw));
        assert_eq!(guess(b"QFI"), Guess::Known(ImageFormat::Raw));
    }

    #[test]
    fn names_are_qemu_imgs() {
        for format in [ImageFormat::Raw, ImageFormat::Qcow2, ImageFormat::Vmdk] {
            assert_eq!(format.name().parse(), Ok(format));
        }
        assert!("vdi".parse::<ImageFormat>().unwrap_err().contains("qemu-img convert -f vdi"));
        assert!("zip".parse::<ImageFormat>().unwrap_err().contains("qcow2"));
    }
}
