//! The flags of qemu-nbd that this version does not have: each is known, and answered with one line that says
//! how to get there today. The flags that we share are in `net.rs`.

use clap::{Arg, ArgAction, ArgMatches, builder::OsStringValueParser};

struct Foreign {
    short: Option<char>,
    long: &'static str,
    takes_value: bool,
    answer: &'static str,
}

const TLS: &str =
    "TLS is not in this version; serve on a Unix socket behind ssh or stunnel, or use nbdkit or qemu-nbd";

/// As `qemu-nbd --help` lists them (10.0), and `--partition` of older versions.
const FOREIGN: &[Foreign] = &[
    value(
        'B',
        "bitmap",
        "dirty bitmaps are kept in qcow2 images, and only qemu knows them: qemu-nbd -B NAME -f qcow2 IMAGE",
    ),
    value(
        'c',
        "connect",
        "a kernel device is made by `nbdbridge ublk`; for this one serve with -k SOCKET, then nbd-client -unix SOCKET DEV",
    ),
    flag(
        'd',
        "disconnect",
        "`nbdbridge detach` lets go of our devices; nbd-client -d DEV of one that nbd-client attached",
    ),
    flag('L', "list", "`nbdbridge info URI` shows what a server has, and so does nbdinfo --list URI"),
    value(
        'l',
        "load-snapshot",
        "snapshots inside an image are not served; qemu-img convert -l SNAPSHOT -O raw makes an image of one",
    ),
    value(
        'T',
        "trace",
        "not in this version; -vvv, or NBDBRIDGE_LOG=trace in the environment, shows every request",
    ),
    long_value(
        "object",
        "there are no objects here: limits are --throttle, and TLS is not in this version (qemu-nbd has it)",
    ),
    long_value("tls-creds", TLS),
    long_value("tls-hostname", TLS),
    long_value("tls-authz", TLS),
    long_value(
        "selinux-label",
        "not in this version; start the server with runcon, or with SELinuxContext= in its systemd unit",
    ),
    Foreign {
        short: None,
        long: "image-opts",
        takes_value: false,
        answer: "not in this version; give a path, file:PATH, mem:SIZE or null:SIZE, and settings by flags of their own",
    },
];

const fn flag(short: char, long: &'static str, answer: &'static str) -> Foreign {
    Foreign { short: Some(short), long, takes_value: false, answer }
}

const fn value(short: char, long: &'static str, answer: &'static str) -> Foreign {
    Foreign { short: Some(short), long, takes_value: true, answer }
}

const fn long_value(long: &'static str, answer: &'static str) -> Foreign {
    Foreign { short: None, long, takes_value: true, answer }
}

/// The flags for clap to know, kept out of the help.
pub(super) fn hidden_args() -> impl Iterator<Item = Arg> {
    FOREIGN.iter().map(|foreign| {
        let arg = Arg::new(foreign.long).long(foreign.long).hide(true);
        let arg = match foreign.short {
            Some(short) => arg.short(short),
            None => arg,
        };
        if foreign.takes_value {
            arg.action(ArgAction::Append).value_parser(OsStringValueParser::new()).value_name("VALUE")
        } else {
            arg.action(ArgAction::Count)
        }
    })
}

/// The line for the first of them that was given.
pub(super) fn answer(matches: &ArgMatches) -> Option<String> {
    let given = |foreign: &&Foreign| {
        matches.value_source(foreign.long) == Some(clap::parser::ValueSource::CommandLine)
    };
    let foreign = FOREIGN.iter().find(given)?;
    let short = foreign.short.map(|short| format!("-{short}/")).unwrap_or_default();
    Some(format!("{short}--{}: {}", foreign.long, foreign.answer))
}
