//! `nbdbridge volumed`: its flags.

use std::path::PathBuf;

use clap::{ArgAction, Args};

use crate::volume::DaemonArgs;

/// Where dockerd looks for plugins.
const SOCKET: &str = "/run/docker/plugins/nbdbridge.sock";

/// The flags as clap reads them.
#[derive(Debug, Args)]
#[command(
    after_help = "docker finds it by its socket:  docker volume create -d nbdbridge -o size=10G data\n\
                        podman is told where it is, in containers.conf:\n  \
                        [engine.volume_plugins]\n  \
                        nbdbridge = \"/run/docker/plugins/nbdbridge.sock\""
)]
pub(super) struct VolumedCommand {
    /// The pool's folder; an empty or missing one is made a pool
    #[arg(long, value_name = "DIR")]
    pool: PathBuf,

    /// Listen there, unless systemd passes a socket
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    docker_socket: PathBuf,

    /// Mount volumes below this folder [default: below /run/nbdbridge/volumes]
    #[arg(long, value_name = "DIR")]
    mount_root: Option<PathBuf>,

    /// Log more: -v refusals, -vv requests
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,
}

impl VolumedCommand {
    /// How much is logged.
    pub(super) fn verbose(&self) -> u8 {
        self.verbose
    }

    /// The typed values.
    pub(super) fn into_args(self) -> DaemonArgs {
        DaemonArgs { pool: self.pool, socket: self.docker_socket, mount_root: self.mount_root }
    }
}
