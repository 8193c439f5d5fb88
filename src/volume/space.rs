//! How much a pool may promise: what it is set to, what there is, and whether one more volume may be.

use std::fmt;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::{Error, Pool, Result, snapshot};
use crate::size;

/// What a pool is set to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Settings {
    /// Bytes of the pool's file system that volumes leave free.
    pub(crate) reserve: Share,
    /// How many times the rest may be promised.
    pub(crate) overcommit: f64,
    /// The size of a volume that nobody gave one, in bytes.
    pub(crate) default_size: u64,
    /// Rights on the host that volumes may give by their mount options.
    pub(crate) allow: Vec<Privilege>,
}

/// A right that a mounted volume can give to whoever writes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Privilege {
    /// Programs in it run with the rights of their owner.
    Suid,
    /// Device nodes in it are devices of the host.
    Dev,
}

impl fmt::Display for Privilege {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Privilege::Suid => "suid",
            Privilege::Dev => "dev",
        })
    }
}

/// A part of something: bytes, or hundredths.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Share {
    Bytes(u64),
    Percent(u8),
}

impl Default for Settings {
    fn default() -> Self {
        Settings { reserve: Share::Percent(5), overcommit: 1.0, default_size: 1 << 30, allow: Vec::new() }
    }
}

impl Share {
    /// So much of `whole`, in bytes.
    fn of(self, whole: u64) -> u64 {
        match self {
            Share::Bytes(bytes) => bytes,
            Share::Percent(percent) => whole / 100 * u64::from(percent),
        }
    }
}

/// Space in a pool, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Space {
    /// Of the file system that it is in.
    pub(crate) capacity: u64,
    pub(crate) free: u64,
    /// Kept free.
    pub(crate) reserve: u64,
    /// The sizes of all volumes, and what their snapshots take.
    pub(crate) promised: u64,
    /// What they may be at most.
    pub(crate) promisable: u64,
}

impl Pool {
    /// How much there is and how much of it is promised.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn space(&self) -> Result<Space> {
        let found =
            rustix::fs::statvfs(self.folder()).with_context(|| self.folder().display().to_string())?;
        let capacity = found.f_blocks.saturating_mul(found.f_frsize);
        let settings = self.settings()?;
        let reserve = settings.reserve.of(capacity);
        let sizes = self.all()?.into_iter().filter_map(|(name, record)| {
            let disk = record.ok().filter(|record| record.format.is_some())?.size;
            Some(disk.saturating_add(self.folder_of(&name).map_or(0, |folder| snapshot::promised(&folder))))
        });
        let promised = sizes.fold(0_u64, u64::saturating_add);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
        let promisable = (capacity.saturating_sub(reserve) as f64 * settings.overcommit) as u64;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        Ok(Space { capacity, free, reserve, promised, promisable })
    }

    /// Whether `promised` more bytes of volumes may be there, of which `now` are taken at once. To be asked with the pool
    /// locked, until the promise is written down.
    ///
    /// # Errors
    /// [`Error::Refused`] with what there is, and the way out.
    pub(super) fn admit(&self, promised: u64, now: u64) -> Result<()> {
        let space = self.space()?;
        let left = space.promisable.saturating_sub(space.promised);
        let (pool, human) = (self.folder().display(), size::human);
        if promised > left {
            return Err(Error::Refused(format!(
                "{pool}: {} are more than the {} that may still be promised (of {}, {} are); remove volumes, or see \
                 nbdbridge volume pool --overcommit",
                human(promised),
                human(left),
                human(space.promisable),
                human(space.promised)
            )));
        }
        let spare = space.free.saturating_sub(space.reserve);
        if space.free < space.reserve || now > spare {
            return Err(Error::Refused(format!(
                "{pool}: no space: {} are wanted, and of {} free {} are kept in reserve; make room, or see \
                 nbdbridge volume pool --reserve",
                human(now),
                human(space.free),
                human(space.reserve)
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        assert_eq!(Share::Bytes(7).of(1), 7);
        assert_eq!(
            (Share::Percent(5).of(1000), Share::Percent(100).of(1000), Share::Percent(0).of(7)),
            (50, 1000, 0)
        );
        let settings: Settings = serde_json::from_str(r#"{"reserve": {"percent": 9}}"#).unwrap();
        assert_eq!(settings, Settings { reserve: Share::Percent(9), ..Settings::default() });
    }
}
