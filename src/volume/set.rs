//! Changing what is recorded of a volume after it was made: its mount options. They hold from its next mount on.

use super::{Error, Name, Options, Pool, Result};

impl Pool {
    /// Replaces the mount options of a volume by those of `options`, which say nothing else.
    ///
    /// # Errors
    /// [`Error::Usage`]: they say something else; [`Error::Refused`]: they are not allowed.
    pub(crate) fn set(&self, name: &Name, options: &Options) -> Result<()> {
        let mount = options.mount.clone();
        if *options != (Options { mount: mount.clone(), ..Options::default() }) {
            return Err(Error::Usage(
                "of a volume that is made only mount-options can be set; see also nbdbridge volume limit and resize"
                    .to_owned(),
            ));
        }
        let mut volume = self.volume(name)?;
        if volume.record.fs == super::FsKind::None && !mount.is_empty() {
            return Err(Error::Refused(format!("volume `{name}` has no file system to mount (fs=none)")));
        }
        self.check_mount_options(volume.record.fs, &mount)?;
        volume.record.options.mount = mount;
        volume.save()
    }
}
