//! `nbdbridge volume`: the commands of the volume engine, and the typed values made of their words.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::{UsageError, values};
use crate::size::{self, NewSize};
use crate::volume::{Name, Options, Origin, Privilege};

/// What to do with volumes.
#[derive(Debug)]
pub(crate) struct VolumeAction {
    /// Where they are.
    pub(crate) pool: PathBuf,
    /// Where they are mounted; None for the usual place.
    pub(crate) mount_root: Option<PathBuf>,
    /// Print JSON.
    pub(crate) json: bool,
    pub(crate) wish: VolumeWish,
}

/// One command.
#[derive(Debug)]
pub(crate) enum VolumeWish {
    Create {
        name: Name,
        options: Box<Options>,
    },
    List,
    Inspect {
        names: Vec<Name>,
    },
    Remove {
        names: Vec<Name>,
        force: bool,
    },
    Mount {
        name: Name,
    },
    Unmount {
        name: Name,
    },
    /// None takes all limits away; no text shows them.
    Limit {
        name: Name,
        change: Option<String>,
    },
    /// Mount options, from the next mount on.
    Set {
        name: Name,
        options: Box<Options>,
    },
    Check {
        name: Name,
        repair: bool,
    },
    Resize {
        name: Name,
        size: NewSize,
    },
    /// The snapshots of a volume.
    Snapshots {
        name: Name,
    },
    Snapshot {
        name: Name,
        snapshot: Name,
        /// Writers are held up no longer.
        freeze_limit: Duration,
    },
    RemoveSnapshot {
        name: Name,
        snapshot: Name,
    },
    Pool(PoolWish),
}

/// What the pool is to be; None stays as it is.
#[derive(Debug)]
pub(crate) struct PoolWish {
    pub(crate) make: bool,
    pub(crate) reserve: Option<crate::volume::Share>,
    pub(crate) overcommit: Option<f64>,
    pub(crate) default_size: Option<u64>,
    pub(crate) allow: Option<Vec<Privilege>>,
}

/// `nbdbridge volume`.
#[derive(Debug, Args)]
#[command(
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "A volume:  nbdbridge volume create data -o size=10G --pool /srv/volumes\n\
                  Its files: nbdbridge volume mount data --pool /srv/volumes"
)]
pub(super) struct VolumeCommand {
    /// The folder that the volumes are in; create makes it a pool where it is empty or missing
    #[arg(long, value_name = "DIR", global = true, env = "NBDBRIDGE_POOL")]
    pool: Option<PathBuf>,

    /// Mount volumes below this folder [default: /run/nbdbridge/volumes/POOL]
    #[arg(long, value_name = "DIR", global = true)]
    mount_root: Option<PathBuf>,

    /// Print JSON
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    words: Words,
}

#[derive(Debug, Subcommand)]
enum Words {
    /// Make a volume, with a file system on it
    #[command(after_help = OPTIONS)]
    Create {
        /// Letters, digits, `_`, `.` and `-`
        name: Name,
        /// How it is to be, as in -o size=10G -o fs=xfs; see below
        #[arg(short, long = "option", value_name = "KEY=VALUE")]
        option: Vec<String>,
    },
    /// List the volumes of a pool
    #[command(visible_alias = "list")]
    Ls,
    /// Tell all that is known of volumes
    Inspect {
        /// Which
        #[arg(value_name = "NAME", required = true)]
        names: Vec<Name>,
    },
    /// Remove volumes, with all that is in them
    Rm {
        /// Which
        #[arg(value_name = "NAME", required = true)]
        names: Vec<Name>,
        /// Also one that is in use, whose users get errors then, or broken
        #[arg(long)]
        force: bool,
    },
    /// Mount a volume, and print where
    Mount {
        /// Which
        name: Name,
    },
    /// Unmount a volume that was mounted by hand
    #[command(visible_alias = "unmount")]
    Umount {
        /// Which
        name: Name,
    },
    /// Show or change a volume's limits, also while it is used
    Limit {
        /// Which
        name: Name,
        /// Limits to change, as in iops-total=1000 bps-write=50M; 0 takes one away, and `off` all of them. Without any, they
        /// are shown
        #[arg(value_name = "KEY=VALUE")]
        limits: Vec<String>,
    },
    /// Change the mount options of a volume, from its next mount on
    #[command(arg_required_else_help = true)]
    Set {
        /// Which
        name: Name,
        /// The new mount options, as in -o mount-options=noatime,discard; none: -o mount-options=
        #[arg(short, long = "option", value_name = "KEY=VALUE", required = true)]
        option: Vec<String>,
    },
    /// Check the file system of a volume that is not mounted
    Fsck {
        /// Which
        name: Name,
        /// Put right what is wrong
        #[arg(long)]
        repair: bool,
    },
    /// Make a volume larger, also while it is used
    #[command(
        after_help = "Image, device and file system grow; they never shrink. Where the file system cannot grow at once, it \
                            does when the volume is next mounted, and a line says why."
    )]
    Resize {
        /// Which
        name: Name,
        /// Its new size, or +SIZE for so much more; K, M, G and T are powers of 1024
        #[arg(value_parser = NewSize::parse)]
        size: NewSize,
    },
    /// Take a snapshot of a volume, also while it is used; without SNAPSHOT, list them
    #[command(
        after_help = "The file system of a volume in use is frozen until its disk is copied. Where the pool's file system \
                            has reflinks (xfs, btrfs) that takes a moment."
    )]
    Snapshot {
        /// Of which volume
        name: Name,
        /// The snapshot's name; VOLUME@SNAPSHOT means it elsewhere
        snapshot: Option<Name>,
        /// Remove it; what was made from it stays as it is
        #[arg(long, requires = "snapshot")]
        remove: bool,
        /// Give up when its users would be held up for longer
        #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = values::parse_positive_duration,
              conflicts_with = "remove")]
        freeze_limit: Duration,
    },
    /// Make a volume that is a copy of another one, or of a snapshot
    Clone {
        /// Of what
        #[arg(value_name = "VOLUME[@SNAPSHOT]")]
        origin: Origin,
        /// The new volume
        name: Name,
        /// What is to be different, as in -o size=20G; see `create`
        #[arg(short, long = "option", value_name = "KEY=VALUE")]
        option: Vec<String>,
    },
    /// Show or change what a pool is set to, and how much of it is promised
    Pool {
        /// Make DIR a pool, although it is not empty
        #[arg(long)]
        make: bool,
        /// Leave so much of the pool's file system free: a size, or a share as in 5%
        #[arg(long, value_name = "SIZE", value_parser = parse_share)]
        reserve: Option<crate::volume::Share>,
        /// Promise so many times what there is beside the reserve, as in 1.5
        #[arg(long, value_name = "RATIO", value_parser = parse_ratio)]
        overcommit: Option<f64>,
        /// The size of volumes that nobody gives one
        #[arg(long, value_name = "SIZE", value_parser = parse_default_size)]
        default_size: Option<u64>,
        /// What volumes may ask for by mount-options, which they are mounted without: suid, dev, or none of both
        #[arg(long, value_name = "WHAT", value_parser = parse_allow)]
        allow: Option<Allow>,
    },
}

/// The value of `--allow`.
#[derive(Clone, Debug)]
struct Allow(Vec<Privilege>);

/// What the help of `create` says about its options.
const OPTIONS: &str = "Options:\n  \
    size=SIZE                 K, M, G and T are powers of 1024 [default: the pool's, at first 1G]\n  \
    fs=ext4|xfs|btrfs|none    none: its users get a block device [default: ext4]\n  \
    format=raw|qcow2          of its disk [default: raw]\n  \
    provision=thin|thick      thick reserves the space at once, and keeps it [default: thin]\n  \
    mkfs-options=WORDS        for mkfs, of a list that a refusal shows\n  \
    mount-options=WORDS       as mount(8) takes them, as in noatime,discard; of a list too.\n                            \
    It is mounted nosuid,nodev (see `pool --allow`), and an error makes it read-only\n  \
    uid=N, gid=N, mode=OCTAL  of the root folder\n  \
    read-only=true            nobody can change anything\n  \
    door=auto|ublk|fuse       how the kernel gets at it [default: auto, the best that this host has]\n  \
    from=VOLUME[@SNAPSHOT]    a copy, with the file system of its origin\n  \
    source=nbd://HOST/NAME    a remote disk; its file system is used, and made where it is empty\n  \
    iops-total=N, bps-read=SIZE, ...\n                            limits, with the keys of --throttle\n\
    Equal options a second time find the volume that is there.";

impl VolumeCommand {
    /// Checks what clap cannot, and makes the typed values.
    pub(super) fn into_action(self) -> Result<VolumeAction, UsageError> {
        let Some(pool) = self.pool else {
            return Err(UsageError::new(
                "which pool? --pool DIR says it, or NBDBRIDGE_POOL in the environment",
            ));
        };
        let wish = self.words.into_wish()?;
        Ok(VolumeAction { pool, mount_root: self.mount_root, json: self.json, wish })
    }
}

impl Words {
    fn into_wish(self) -> Result<VolumeWish, UsageError> {
        Ok(match self {
            Words::Create { name, option } => VolumeWish::Create { name, options: parse_options(&option)? },
            Words::Clone { origin, name, option } => {
                let from = format!("from={origin}");
                let option: Vec<_> = option.into_iter().chain([from]).collect();
                VolumeWish::Create { name, options: parse_options(&option)? }
            }
            Words::Resize { name, size } => VolumeWish::Resize { name, size },
            Words::Snapshot { name, snapshot: None, .. } => VolumeWish::Snapshots { name },
            Words::Snapshot { name, snapshot: Some(snapshot), remove: true, .. } => {
                VolumeWish::RemoveSnapshot { name, snapshot }
            }
            Words::Snapshot { name, snapshot: Some(snapshot), freeze_limit, .. } => {
                VolumeWish::Snapshot { name, snapshot, freeze_limit }
            }
            Words::Ls => VolumeWish::List,
            Words::Inspect { names } => VolumeWish::Inspect { names },
            Words::Rm { names, force } => VolumeWish::Remove { names, force },
            Words::Mount { name } => VolumeWish::Mount { name },
            Words::Umount { name } => VolumeWish::Unmount { name },
            Words::Limit { name, limits } => {
                let off = limits.len() == 1 && limits[0] == "off";
                VolumeWish::Limit { name, change: (!off).then(|| limits.join(",")) }
            }
            Words::Set { name, option } => VolumeWish::Set { name, options: parse_options(&option)? },
            Words::Fsck { name, repair } => VolumeWish::Check { name, repair },
            Words::Pool { make, reserve, overcommit, default_size, allow } => {
                let allow = allow.map(|Allow(allow)| allow);
                VolumeWish::Pool(PoolWish { make, reserve, overcommit, default_size, allow })
            }
        })
    }
}

fn parse_options(words: &[String]) -> Result<Box<Options>, UsageError> {
    let pairs = words.iter().map(|word| word.split_once('=').unwrap_or((word, "")));
    let options = Options::parse(pairs).map_err(|error| UsageError::new(error.to_string()))?;
    Ok(Box::new(options))
}

fn parse_share(text: &str) -> Result<crate::volume::Share, String> {
    use crate::volume::Share;
    match text.strip_suffix('%') {
        Some(percent) => {
            let percent = percent.parse().ok().filter(|percent| *percent <= 100);
            percent.map(Share::Percent).ok_or_else(|| "a share from 0% to 100%".to_owned())
        }
        None => size::parse(text).map(Share::Bytes).map_err(|error| error.to_string()),
    }
}

fn parse_allow(text: &str) -> Result<Allow, String> {
    if text == "none" {
        return Ok(Allow(Vec::new()));
    }
    let allow = text.split(',').map(|word| match word {
        "suid" => Ok(Privilege::Suid),
        "dev" => Ok(Privilege::Dev),
        _ => Err("suid, dev, suid,dev or none".to_owned()),
    });
    let mut allow = allow.collect::<Result<Vec<_>, _>>()?;
    allow.sort_unstable();
    allow.dedup();
    Ok(Allow(allow))
}

fn parse_ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse::<f64>().ok().filter(|ratio| (0.01..=1000.0).contains(ratio));
    ratio.ok_or_else(|| "a number from 0.01 to 1000".to_owned())
}

fn parse_default_size(text: &str) -> Result<u64, String> {
    match size::parse(text) {
        Ok(bytes) if bytes > 0 && bytes % 4096 == 0 => Ok(bytes),
        Ok(_) => Err("must be a multiple of 4096 bytes, and not 0".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
