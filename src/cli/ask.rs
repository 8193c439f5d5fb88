//! `nbdbridge ps`, `stats`, `throttle`, `resize`: the flags of the commands that ask running servers.

use std::ffi::OsString;

use clap::Args;

use super::UsageError;
use crate::size::NewSize;

/// What to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AskAction {
    /// What runs here.
    Ps {
        /// As JSON.
        json: bool,
    },
    /// Counters of one export, or of all.
    Stats {
        /// Which.
        export: Option<OsString>,
        /// As JSON.
        json: bool,
    },
    /// Limits of an export.
    Throttle {
        /// Which.
        export: OsString,
        /// Not its own, but those that it shares with this group.
        group: Option<String>,
        /// What with them.
        wish: LimitsWish,
        /// As JSON.
        json: bool,
    },
    /// An export's size.
    Resize {
        /// Which.
        export: OsString,
        /// Its new size.
        size: NewSize,
        /// As JSON.
        json: bool,
    },
}

/// What to do with limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LimitsWish {
    /// Nothing, only show them.
    Show,
    /// No limits any more.
    Off,
    /// These keys, not looked into here, become these values.
    Change(Vec<(String, String)>),
}

/// What the help of each says about EXPORT.
const WHICH: &str = "EXPORT is the name of an export; PID:NAME, or PID, where several servers have that name; where it \
                     is found (a device, a mounted file, a URI); or its source, as in disk.img.";

/// `nbdbridge ps`.
#[derive(Debug, Args)]
pub(super) struct PsCommand {
    /// Print JSON: all that is known of each server, with its doors and clients
    #[arg(long)]
    json: bool,
}

/// `nbdbridge stats`.
#[derive(Debug, Args)]
#[command(after_help = WHICH)]
pub(super) struct StatsCommand {
    /// Which export [default: all]
    #[arg(value_name = "EXPORT")]
    export: Option<OsString>,

    /// Print JSON, with the whole histogram of latencies
    #[arg(long)]
    json: bool,
}

/// `nbdbridge throttle`.
#[derive(Debug, Args)]
#[command(after_help = WHICH)]
pub(super) struct ThrottleCommand {
    /// Which export
    #[arg(value_name = "EXPORT")]
    export: OsString,

    /// Limits to change, as in iops-total=1000 bps-read=50M, with the keys of --throttle; 0 takes one away, and `off`
    /// all of them. After group=NAME, those of a group, for all exports in it. Without any, they are shown
    #[arg(value_name = "KEY=VALUE")]
    limits: Vec<String>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `nbdbridge resize`.
#[derive(Debug, Args)]
#[command(after_help = WHICH)]
pub(super) struct ResizeCommand {
    /// Which export
    #[arg(value_name = "EXPORT")]
    export: OsString,

    /// Its new size, or +SIZE for so much more; an export only grows
    #[arg(value_name = "SIZE", value_parser = NewSize::parse)]
    size: NewSize,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl PsCommand {
    /// The typed values.
    pub(super) fn into_action(self) -> AskAction {
        AskAction::Ps { json: self.json }
    }
}

impl StatsCommand {
    /// The typed values.
    pub(super) fn into_action(self) -> AskAction {
        AskAction::Stats { export: self.export, json: self.json }
    }
}

impl ThrottleCommand {
    /// The typed values. Commas separate settings too, as in --throttle.
    pub(super) fn into_action(self) -> Result<AskAction, UsageError> {
        let (mut group, mut words) = (None, Vec::new());
        for word in self.limits.iter().flat_map(|word| word.split(',')) {
            match word.trim().strip_prefix("group=") {
                Some(name) if group.is_none() => group = Some(name.to_owned()),
                Some(_) => return Err(UsageError::new("one group at a time")),
                None => words.push(word),
            }
        }
        let wish = match (&words[..], &group) {
            ([], None) => LimitsWish::Show,
            ([], Some(name)) => {
                let words = "say what its limits become, as in iops-total=1000, or `off`";
                return Err(UsageError::new(format!("group={name}: {words}")));
            }
            (["off"], _) => LimitsWish::Off,
            _ => LimitsWish::Change(words.into_iter().map(pair).collect::<Result<_, _>>()?),
        };
        Ok(AskAction::Throttle { export: self.export, group, wish, json: self.json })
    }
}

impl ResizeCommand {
    /// The typed values.
    pub(super) fn into_action(self) -> AskAction {
        AskAction::Resize { export: self.export, size: self.size, json: self.json }
    }
}

fn pair(word: &str) -> Result<(String, String), UsageError> {
    let (key, value) = word
        .split_once('=')
        .ok_or_else(|| UsageError::new(format!("`{word}` is no KEY=VALUE, as in iops-total=1000")))?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}
