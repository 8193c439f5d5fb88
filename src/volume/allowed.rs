//! Options that a file system may be made and mounted with. They come from users of containers, or with a copied folder,
//! and mkfs and the kernel obey them as root: only what is known to do no harm outside of the volume is on these lists.
//!
//! Nothing here looks at a disk. The lists are in [`ext4`], [`xfs`] and [`btrfs`].

mod btrfs;
mod ext4;
mod value;
mod xfs;

use super::{Error, FsKind, Result};
use value::{Known, Value};

/// Mount options of every file system. The kernel takes them as flags.
const GENERIC: &[Known] = &[
    ("defaults", Value::Nothing),
    ("rw", Value::Nothing),
    ("ro", Value::Nothing),
    ("exec", Value::Nothing),
    ("noexec", Value::Nothing),
    ("nosuid", Value::Nothing),
    ("nodev", Value::Nothing),
    ("suid", Value::Nothing),
    ("dev", Value::Nothing),
    ("async", Value::Nothing),
    ("sync", Value::Nothing),
    ("dirsync", Value::Nothing),
    ("atime", Value::Nothing),
    ("noatime", Value::Nothing),
    ("diratime", Value::Nothing),
    ("nodiratime", Value::Nothing),
    ("relatime", Value::Nothing),
    ("norelatime", Value::Nothing),
    ("strictatime", Value::Nothing),
    ("nostrictatime", Value::Nothing),
    ("lazytime", Value::Nothing),
    ("nolazytime", Value::Nothing),
];

impl FsKind {
    /// Checks mount options, separated by commas.
    ///
    /// # Errors
    /// [`Error::Refused`] for the first option that is not on the list of this file system, with the list.
    pub(super) fn check_mount_options(self, options: &str) -> Result<()> {
        let own = self.mount_options();
        for option in options.split(',').map(str::trim).filter(|option| !option.is_empty()) {
            let (name, value) = value::split(option);
            let mut known = GENERIC.iter().chain(own).filter(|(known, _)| *known == name);
            if !known.any(|(_, wanted)| wanted.accepts(value)) {
                let all: Vec<_> = GENERIC.iter().chain(own).map(|known| value::show(known, "=")).collect();
                return Err(self.refuse(&format!("mount-options={options}"), option, &all.join(", ")));
            }
        }
        Ok(())
    }

    /// Checks words for the mkfs program, as getopt_long(3) reads them: `-b 1024`, `-b1024`, `-qF`, `--label=x`.
    ///
    /// # Errors
    /// [`Error::Refused`] for the first word that is not on the list of this program, with the list.
    pub(super) fn check_mkfs_options(self, words: &[String]) -> Result<()> {
        let known = self.mkfs_options();
        let mut rest = words.iter().map(String::as_str);
        while let Some(word) = rest.next() {
            if !accepts_word(known, word, &mut rest) {
                let all: Vec<_> = known.iter().map(|known| value::show(known, " ")).collect();
                let option = format!("mkfs-options={}", words.join(" "));
                return Err(self.refuse(&option, word, &all.join(", ")));
            }
        }
        Ok(())
    }

    fn refuse(self, option: &str, part: &str, all: &str) -> Error {
        if all.is_empty() {
            return Error::Refused(format!("option {option}: fs={self} takes none"));
        }
        Error::Refused(format!("option {option}: `{part}` is not allowed; with fs={self} there are {all}"))
    }

    fn mount_options(self) -> &'static [Known] {
        match self {
            FsKind::Ext4 => ext4::MOUNT,
            FsKind::Xfs => xfs::MOUNT,
            FsKind::Btrfs => btrfs::MOUNT,
            FsKind::None => &[],
        }
    }

    fn mkfs_options(self) -> &'static [Known] {
        match self {
            FsKind::Ext4 => ext4::MKFS,
            FsKind::Xfs => xfs::MKFS,
            FsKind::Btrfs => btrfs::MKFS,
            FsKind::None => &[],
        }
    }

    /// The mount option that says what an error does, which no other option and no superblock overrules; xfs has none:
    /// it shuts the file system down.
    pub(super) fn on_error(self) -> Option<&'static str> {
        match self {
            FsKind::Ext4 => Some("errors=remount-ro"),
            FsKind::Btrfs => Some("fatal_errors=bug"),
            FsKind::Xfs | FsKind::None => None,
        }
    }
}

/// Checks one word, and takes the next one where that is its value.
fn accepts_word<'a>(known: &[Known], word: &str, rest: &mut impl Iterator<Item = &'a str>) -> bool {
    let find = |name: &str| known.iter().find(|(known, _)| *known == name).map(|(_, value)| value);
    if word.starts_with("--") {
        let (name, given) = value::split(word);
        return match find(name) {
            Some(Value::Nothing) => given.is_none(),
            Some(wanted) => wanted.accepts(given.or_else(|| rest.next())),
            None => false,
        };
    }
    let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) else { return false };
    for (at, letter) in letters.char_indices() {
        match find(&format!("-{letter}")) {
            Some(Value::Nothing) => {}
            Some(wanted) => {
                let given = &letters[at + letter.len_utf8()..];
                return wanted.accepts(if given.is_empty() { rest.next() } else { Some(given) });
            }
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [FsKind; 3] = [FsKind::Ext4, FsKind::Xfs, FsKind::Btrfs];

    fn mkfs(fs: FsKind, line: &str) -> Result<()> {
        let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        fs.check_mkfs_options(&words)
    }

    #[test]
    fn options_of_each_file_system_are_allowed() {
        for fs in ALL {
            fs.check_mount_options("").unwrap();
            fs.check_mount_options("noatime, discard,,nodev,nosuid,defaults,lazytime").unwrap();
            mkfs(fs, "").unwrap();
            mkfs(fs, "-q -L hello_1.2-3").unwrap();
        }
        FsKind::None.check_mount_options("").unwrap();
        for line in [
            "data=journal,commit=30,barrier=0,errors=remount-ro",
            "data_err=abort,nodelalloc,stripe=128,resuid=7,usrquota,init_itable=10,noinit_itable",
        ] {
            FsKind::Ext4.check_mount_options(line).unwrap();
        }
        FsKind::Xfs.check_mount_options("nouuid,allocsize=64k,logbsize=256k,pquota,inode64").unwrap();
        for line in
            ["compress=zstd:3,compress-force=lzo,space_cache=v2,discard=async", "subvol=data,ssd,nodatacow"]
        {
            FsKind::Btrfs.check_mount_options(line).unwrap();
        }
        for line in [
            "-m 0 -q",
            "-m0.5 -b 1024 -i16384 -I 256 -J size=8,fast_commit_size=1",
            "-E stride=16,stripe_width=32,lazy_itable_init=0,nodiscard -O ^has_journal,quota -T largefile4",
            "-qF -U random -e remount-ro -j -U 0c1c6a9c-8bd5-4b06-a1ac-8c1ec5fd6a3c",
        ] {
            mkfs(FsKind::Ext4, line).unwrap();
        }
        for line in [
            "-m reflink=1,crc=1 -b size=4096 -d agcount=4,su=64k,sw=2",
            "-l size=64m,su=4k -i size=512 -K -f",
        ] {
            mkfs(FsKind::Xfs, line).unwrap();
        }
        for line in [
            "--data single -m dup --nodesize=16k --csum xxhash -O no-holes,^extref",
            "--label=x --mixed -R free-space-tree",
        ] {
            mkfs(FsKind::Btrfs, line).unwrap();
        }
    }

    #[test]
    fn what_does_harm_or_is_unknown_is_refused_with_the_list() {
        let refused = |result: Result<()>, part: &str| {
            let line = result.expect_err(part).to_string();
            assert!(line.contains(part) && line.contains("is not allowed; with fs="), "{part}: {line}");
            assert_eq!(line.lines().count(), 1);
        };
        for fs in ALL {
            for option in [
                "errors=panic",
                "errors=continue",
                "errors=",
                "fatal_errors=panic",
                "fatal_errors=bug",
                "device=/dev/sdb",
                "logdev=sda1",
                "rtdev=x",
                "journal_dev=0x801",
                "journal_path=/dev/sdb",
                "degraded",
                "rescue=all",
                "norecovery",
                "noload",
                "dax",
                "debug",
                "context=a",
                "x-mount.mkdir",
                "loop",
                "remount",
                "bind",
                "user",
                "NOATIME",
                "noatime=1",
                "commit=",
                "commit=x",
                "commit=-1",
                "abort",
                "test_dummy_encryption",
                "inlinecrypt",
                "usrjquota=x",
                "=",
                "a b",
                "discard=/dev/sdb",
            ] {
                refused(fs.check_mount_options(&format!("noatime,{option}")), option);
            }
            for word in [
                "/dev/sdb",
                "x",
                "-",
                "--",
                "-L",
                "-L -x",
                "--no-such",
                "-V",
                "-Z",
                "-d /root",
                "-d/root",
                "-L /x",
                "-l logdev=x",
                "-rrtdev=x",
                "--rootdir=/etc",
                "--rootdir /etc",
                "-r /etc",
                "-p proto",
                "-c options=/x",
                "-J device=UUID=x",
                "-Jdevice=x",
                "-O journal_dev",
                "-e panic",
                "-epanic",
                "-qe panic",
                "-n",
                "-N",
                "-S",
                "-E offset=5",
                "-E test_fs",
                "-z undo",
                "-t ext2",
                "-M /mnt",
                "-d file,name=x",
                "-l internal=0",
                "-ÄL x",
                "--label",
                "-O list-all",
                "-v -V",
                "--help",
                "--version",
            ] {
                let result = mkfs(fs, word);
                let line = result.expect_err(word).to_string();
                assert!(
                    line.contains("is not allowed; with fs=") && line.lines().count() == 1,
                    "{word}: {line}"
                );
            }
        }
        assert!(FsKind::None.check_mkfs_options(&["-q".to_owned()]).is_err());
    }
}
