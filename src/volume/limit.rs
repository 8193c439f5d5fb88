//! Limits of a volume, also while it is used; and the check of its file system, while it is not.

use bridge::layer::ThrottleConfig;

use super::filesystem::{Check, Verdict};
use super::plane::Life;
use super::{Error, FsKind, Name, Pool, Progress, Result, bounded, private};

impl Pool {
    /// Changes the limits of a volume for good, and at once where it is in use. `change` has the keys of the options, in
    /// which 0 takes one away; None takes all away.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn limit(&self, name: &Name, change: Option<&str>) -> Result<ThrottleConfig> {
        let mut volume = self.volume(name)?;
        if let Some(plane) = &volume.state()?.plane {
            bounded::check(&plane.device)?;
        }
        let before = volume.record.limits;
        volume.record.limits = match change {
            None => ThrottleConfig::default(),
            Some(text) => before.changed(text).map_err(|error| Error::Usage(error.to_string()))?,
        };
        volume.save()?;
        let mut state = volume.state()?;
        if let Some(plane) = state.plane.as_mut().filter(|plane| plane.life() == Life::Serves) {
            plane.follow();
            if let Err(error) = volume.tell_limits(plane) {
                volume.record.limits = before;
                volume.save()?;
                return Err(error);
            }
        }
        Ok(volume.record.limits)
    }

    /// Checks the file system of a volume that is not mounted.
    ///
    /// # Errors
    /// [`Error::InUse`]; [`Error::Broken`] with what is wrong.
    pub(crate) fn fsck(&self, name: &Name, repair: bool, progress: &dyn Progress) -> Result<Verdict> {
        let mut volume = self.volume(name)?;
        let mut state = volume.state()?;
        if state.mounted.is_some() || !state.holders.is_empty() {
            let why = super::remove::describe(&state);
            return Err(Error::InUse(format!(
                "volume `{name}` is in use: {why}; a check needs it unmounted"
            )));
        }
        if volume.record.fs == FsKind::None {
            return Err(Error::Refused(format!("volume `{name}` has no file system to check (fs=none)")));
        }
        if repair && volume.record.options.read_only {
            return Err(Error::Refused(format!("volume `{name}` is read-only")));
        }
        if let Some(plane) = state.plane.as_ref().filter(|plane| plane.is_in_use()) {
            let why = plane.describe_use();
            return Err(Error::InUse(format!(
                "volume `{name}` is in use: {why}; a check needs it unmounted"
            )));
        }
        let device = volume.attach(&mut state, volume.record.options.read_only, progress)?;
        let check = || {
            volume.refuse_other_devices(&device)?;
            if volume.record.unclean && !volume.record.options.read_only {
                progress.step("replaying the log");
                // Only the kernel can; one that cannot be mounted is looked at as it is.
                let _ = private::mounted(&volume, &device, |_| Ok(()));
            }
            progress.step("checking the file system");
            volume.record.fs.check(&device, if repair { Check::Repair } else { Check::Look })
        };
        let verdict = check();
        // What was only looked at is as unclean as before.
        let unclean = volume.record.unclean && !(repair && verdict.is_ok());
        volume.take_down(&mut state, false)?;
        if volume.record.unclean != unclean {
            volume.record.unclean = unclean;
            volume.save()?;
        }
        verdict.map_err(|error| match error {
            Error::Broken(line) => Error::Broken(format!("volume `{name}`: {line}")),
            other => other,
        })
    }
}
