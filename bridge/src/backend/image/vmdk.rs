//! VMDK descriptors as VMware, VirtualBox, qemu and others write them (Virtual Disk Format 5.0, "The descriptor file").
//!
//! The descriptor is read here: keys that do not say where bytes lie are ignored, and names are bytes in any encoding.
//! imago gets one in its own words, in which extents have numbers for names; the files are open by then.
//!
//! An extent's file that is shorter than the descriptor tells reads as zeroes from its end on.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::format::gate::ImplicitOpenGate;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::chain::{Files, unsupported};
use super::host::Host;
use super::names::Policy;
use crate::backend::memory::MemoryBackend;
use crate::{Backend, Buffer, Flags, OpenError};

/// Unit of a descriptor's numbers, in bytes.
const SECTOR: u64 = 512;

/// Longest descriptor, in bytes.
const MAX_DESCRIPTOR: u64 = 1 << 20;

/// Largest disk, in sectors.
const MAX_SECTORS: u64 = 1 << 54;

/// What holds the bytes of an extent.
#[derive(Debug, PartialEq, Eq)]
enum Storage {
    /// A file as it is, from a sector on.
    Flat {
        name: Vec<u8>,
        sector: u64,
    },
    Zero,
    /// Nobody may read it.
    NoAccess,
}

/// A part of the disk.
#[derive(Debug, PartialEq, Eq)]
struct Extent {
    sectors: u64,
    storage: Storage,
}

/// Reads the extents of a descriptor.
///
/// # Errors
/// The end of a line: what is not understood, or not supported.
fn parse(text: &[u8]) -> Result<Vec<Extent>, String> {
    if text.starts_with(b"KDMV") || text.starts_with(b"COWD") {
        return Err("is a sparse vmdk image, and only descriptors with flat extents are read".into());
    }
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut extents = Vec::new();
    let mut all = 0_u64;
    for line in text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii) {
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let access = word(line).0;
        if [&b"RW"[..], b"RDONLY", b"NOACCESS"].iter().any(|known| access.eq_ignore_ascii_case(known)) {
            let extent = extent(line)?;
            all = all.checked_add(extent.sectors).filter(|all| *all <= MAX_SECTORS).ok_or("is too large")?;
            extents.push(extent);
        } else if let Some(at) = line.iter().position(|byte| *byte == b'=') {
            let value = String::from_utf8_lossy(line[at + 1..].trim_ascii()).replace('"', "");
            let key = line[..at].trim_ascii();
            // The content of another image, on which this one is laid.
            if key.eq_ignore_ascii_case(b"parentCID") && !value.eq_ignore_ascii_case("ffffffff")
                || key.eq_ignore_ascii_case(b"parentFileNameHint") && !value.is_empty()
            {
                return Err("is a snapshot over another vmdk image, which is not supported".into());
            }
        }
    }
    if extents.is_empty() {
        return Err("has a descriptor without extents".into());
    }
    Ok(extents)
}

/// Reads `RW 2048 FLAT "name" 0`.
fn extent(line: &[u8]) -> Result<Extent, String> {
    let odd = |what: &str| format!("has an extent with {what}: `{}`", String::from_utf8_lossy(line));
    let (access, rest) = word(line);
    let (sectors, rest) = word(rest);
    let sectors = number(sectors).ok_or_else(|| odd("no number of sectors"))?;
    if access.eq_ignore_ascii_case(b"NOACCESS") {
        return Ok(Extent { sectors, storage: Storage::NoAccess });
    }
    let (kind, rest) = word(rest);
    let kind = String::from_utf8_lossy(kind).to_ascii_uppercase();
    match kind.as_str() {
        "ZERO" => return Ok(Extent { sectors, storage: Storage::Zero }),
        // The bytes of a file or device, on VMware's file system or not.
        "FLAT" | "VMFS" | "VMFSRDM" | "VMFSRAW" => {}
        _ => return Err(odd("a type that is not supported (flat ones are)")),
    }
    let name = rest.strip_prefix(b"\"").ok_or_else(|| odd("no file name in quotes"))?;
    let end = name.iter().rposition(|byte| *byte == b'"').ok_or_else(|| odd("a name that does not end"))?;
    let (name, rest) = (name[..end].to_vec(), name[end + 1..].trim_ascii());
    let sector = match word(rest).0 {
        [] => 0,
        text => number(text).ok_or_else(|| odd("an offset that is no number"))?,
    };
    let sector =
        Some(sector).filter(|sector| *sector <= MAX_SECTORS).ok_or_else(|| odd("too large an offset"))?;
    Ok(Extent { sectors, storage: Storage::Flat { name, sector } })
}

/// The first word, and what follows it.
fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let text = text.trim_ascii();
    let end = text.iter().position(u8::is_ascii_whitespace).unwrap_or(text.len());
    (&text[..end], text[end..].trim_ascii())
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Opens the image whose descriptor is `host`, for reading.
///
/// # Errors
/// One line: what is wrong with the descriptor, or with a file that it names.
pub(super) async fn open(
    path: &Path,
    host: &Host,
    files: &mut Files<'_>,
) -> Result<FormatAccess<Host>, OpenError> {
    let refuse = |reason: &dyn std::fmt::Display| {
        let convert = format!("`qemu-img convert -O qcow2 {} NEW` makes one that works", path.display());
        unsupported(path, format!("{reason}; {convert}"))
    };
    let read =
        |error: std::io::Error| OpenError::Os { path: path.to_owned(), action: "cannot read it", error };
    let len = host.file().geometry().size.min(MAX_DESCRIPTOR);
    let text = host.read_file(0, usize::try_from(len).unwrap_or(0)).await.map_err(read)?;
    let extents = parse(&text).map_err(|reason| refuse(&reason))?;
    let mut plan = Plan { path, files, policy: None, open: HashMap::new(), hosts: Vec::new() };
    let mut descriptor = "# Disk DescriptorFile\nversion=1\n".to_owned();
    for Extent { sectors, storage } in extents {
        plan.lay(&mut descriptor, sectors, storage).await?;
    }
    let text = memory(descriptor.as_bytes());
    let size = text.geometry().size;
    let host = Host::read_only(path, host.number(), text, size);
    let built = Vmdk::<Host>::builder(host).open(Extents(plan.hosts)).await;
    built.map(FormatAccess::new).map_err(|error| refuse(&format!("cannot be opened as vmdk: {error}")))
}

fn memory(bytes: &[u8]) -> Arc<dyn Backend> {
    let memory = MemoryBackend::new(bytes.len() as u64);
    // Memory of its own length takes what it is given at once.
    let _ = memory.try_write(0, bytes, Flags::NONE);
    Arc::new(memory)
}

/// The descriptor for imago, and the files that it leads to, while they are made.
struct Plan<'a, 'b> {
    path: &'a Path,
    files: &'a mut Files<'b>,
    policy: Option<Policy>,
    /// Extents of one name are one file.
    open: HashMap<Vec<u8>, (Host, usize)>,
    hosts: Vec<Host>,
}

impl Plan<'_, '_> {
    /// Adds the lines for an extent.
    async fn lay(&mut self, text: &mut String, sectors: u64, storage: Storage) -> Result<(), OpenError> {
        let mut line = |sectors: u64, what: &str| {
            if sectors > 0 {
                // Text takes what it is given.
                let _ = writeln!(text, "{what}");
            }
        };
        let (name, sector) = match storage {
            Storage::NoAccess => {
                line(sectors, &format!("NOACCESS {sectors}"));
                return Ok(());
            }
            Storage::Zero => {
                line(sectors, &format!("RDONLY {sectors} ZERO"));
                return Ok(());
            }
            Storage::Flat { name, sector } => (name, sector),
        };
        let (host, number) = self.file(name)?;
        let size = host.file().geometry().size;
        let whole = (size / SECTOR).saturating_sub(sector).min(sectors);
        line(whole, &format!("RDONLY {whole} FLAT \"{number}\" {sector}"));
        let mut rest = sectors - whole;
        if rest == 0 {
            return Ok(());
        }
        tracing::warn!(
            "{}: the file {host} is shorter than the descriptor tells: {} bytes of it read as zeroes",
            self.path.display(),
            rest * SECTOR
        );
        let tail = size % SECTOR;
        if tail > 0 && size / SECTOR == sector + whole {
            let bytes = self.tail(&host, size - tail).await?;
            let number = self.files.add(self.path, memory(&bytes))?;
            self.hosts.push(number);
            line(1, &format!("RDONLY 1 FLAT \"{}\" 0", self.hosts.len() - 1));
            rest -= 1;
        }
        line(rest, &format!("RDONLY {rest} ZERO"));
        Ok(())
    }

    /// The last sector of a file, which is there in part.
    async fn tail(&self, host: &Host, offset: u64) -> Result<Buffer, OpenError> {
        host.read_file(offset, usize::try_from(SECTOR).unwrap_or(0)).await.map_err(|error| OpenError::Os {
            path: PathBuf::from(host.to_string()),
            action: "cannot read it",
            error,
        })
    }

    fn file(&mut self, name: Vec<u8>) -> Result<(Host, usize), OpenError> {
        if let Some(found) = self.open.get(&name) {
            return Ok(found.clone());
        }
        let policy = match &mut self.policy {
            Some(policy) => policy,
            none => none.insert(Policy::new(self.path, self.files.any_backing())?),
        };
        let path = policy.admit(self.path, Path::new(OsStr::from_bytes(&name)), "extent")?;
        let found = (self.files.plain(&path)?, self.hosts.len());
        self.hosts.push(found.0.clone());
        self.open.insert(name, found.clone());
        Ok(found)
    }
}

/// Gives imago the files that are open already, by their numbers.
struct Extents(Vec<Host>);

impl ImplicitOpenGate<Host> for Extents {
    async fn open_format<F: FormatDriverBuilder<Host>>(
        &mut self,
        _builder: F,
    ) -> std::io::Result<FormatAccess<Host>> {
        Err(std::io::Error::other("an extent with a format of its own"))
    }

    async fn open_storage(&mut self, options: StorageOpenOptions) -> std::io::Result<Host> {
        let name = options.get_filename().and_then(Path::file_name).and_then(OsStr::to_str);
        let number: Option<usize> = name.and_then(|name| name.parse().ok());
        let host = number.and_then(|number| self.0.get(number).cloned());
        host.ok_or_else(|| std::io::Error::other("an extent without a file"))
    }
}

#[cfg(test)]
mod tests;
