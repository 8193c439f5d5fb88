//! More doors to the same exports: the NBD server beside another door, and which of the doors may write.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::net::NetFlags;
use super::source::ExportArg;
use super::values::Source;
use super::{DoorArgs, UsageError};

/// `--also-net`, and behind it all flags of the server.
#[derive(Debug)]
pub(super) struct AlsoNet {
    wanted: bool,
    net: NetFlags,
}

impl AlsoNet {
    /// The export that `source` is, under the name that the flags give it.
    pub(super) fn name(&self, source: Source) -> ExportArg {
        self.net.name(source)
    }

    /// The door, if it is wanted.
    pub(super) fn into_door(self) -> Result<Option<DoorArgs>, UsageError> {
        if !self.wanted {
            return Ok(None);
        }
        let net = self.net.into_args();
        if net.once {
            let message = "--once would end the other door under its users; it is for nbdbridge net alone";
            return Err(UsageError::new(message));
        }
        Ok(Some(DoorArgs::Net(net)))
    }
}

const SWITCH: &str = "also_net";

impl FromArgMatches for AlsoNet {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(AlsoNet { wanted: matches.get_flag(SWITCH), net: NetFlags::from_arg_matches(matches)? })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// By hand, as a derived one cannot make a whole set of flags need another.
impl Args for AlsoNet {
    fn augment_args(command: Command) -> Command {
        let only_net = NetFlags::augment_args(Command::new("net"));
        let of_net: Vec<_> = only_net.get_arguments().map(|arg| arg.get_id().clone()).collect();
        let switch = Arg::new(SWITCH)
            .long("also-net")
            .action(ArgAction::SetTrue)
            .help_heading("More doors")
            .help("Serve SOURCE to NBD clients, too; they may only read without --multi-writer");
        NetFlags::augment_args(command.arg(switch)).mut_args(|arg| {
            if of_net.contains(arg.get_id()) {
                arg.requires(SWITCH).help_heading("Connections of --also-net")
            } else {
                arg
            }
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Who may write where there are several doors.
#[derive(Debug, Args)]
#[command(next_help_heading = "More doors")]
pub(super) struct Writers {
    /// Let more than one door write: for users that know of each other, such as a cluster's file system
    #[arg(long)]
    pub(super) multi_writer: bool,
}
