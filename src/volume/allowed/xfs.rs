//! Options of xfs and mkfs.xfs (xfs(5), mkfs.xfs(8)) that do no harm outside of the volume.
//!
//! Left out are those that name a device or a file (`logdev`, `rtdev`, `-d name`, `-l logdev`, `-r`, `-p`, `-c`), make
//! nothing (`-N`, `-V`), or skip the log (`norecovery`).

use super::value::{Known, Value};

const SWITCH: Value = Value::Optional(&Value::OneOf(&["0", "1"]));

pub(super) const MOUNT: &[Known] = &[
    ("discard", Value::Nothing),
    ("nodiscard", Value::Nothing),
    ("allocsize", Value::Size),
    ("filestreams", Value::Nothing),
    ("ikeep", Value::Nothing),
    ("noikeep", Value::Nothing),
    ("inode32", Value::Nothing),
    ("inode64", Value::Nothing),
    ("largeio", Value::Nothing),
    ("nolargeio", Value::Nothing),
    ("logbufs", Value::Number),
    ("logbsize", Value::Size),
    ("noalign", Value::Nothing),
    ("sunit", Value::Number),
    ("swidth", Value::Number),
    ("swalloc", Value::Nothing),
    ("nouuid", Value::Nothing),
    ("wsync", Value::Nothing),
    ("attr2", Value::Nothing),
    ("grpid", Value::Nothing),
    ("nogrpid", Value::Nothing),
    ("bsdgroups", Value::Nothing),
    ("sysvgroups", Value::Nothing),
    ("quota", Value::Nothing),
    ("noquota", Value::Nothing),
    ("uquota", Value::Nothing),
    ("usrquota", Value::Nothing),
    ("gquota", Value::Nothing),
    ("grpquota", Value::Nothing),
    ("pquota", Value::Nothing),
    ("prjquota", Value::Nothing),
    ("uqnoenforce", Value::Nothing),
    ("gqnoenforce", Value::Nothing),
    ("pqnoenforce", Value::Nothing),
    ("qnoenforce", Value::Nothing),
];

pub(super) const MKFS: &[Known] = &[
    ("-b", Value::Keys(&[("size", Value::Size)])),
    (
        "-m",
        Value::Keys(&[
            ("bigtime", SWITCH),
            ("crc", SWITCH),
            ("finobt", SWITCH),
            ("inobtcount", SWITCH),
            ("reflink", SWITCH),
            ("rmapbt", SWITCH),
            ("uuid", Value::Uuid(&[])),
        ]),
    ),
    (
        "-d",
        Value::Keys(&[
            ("agcount", Value::Number),
            ("agsize", Value::Size),
            ("cowextsize", Value::Number),
            ("extszinherit", Value::Number),
            ("noalign", SWITCH),
            ("projinherit", Value::Number),
            ("sectsize", Value::Size),
            ("su", Value::Size),
            ("sunit", Value::Number),
            ("sw", Value::Number),
            ("swidth", Value::Number),
        ]),
    ),
    ("-f", Value::Nothing),
    (
        "-i",
        Value::Keys(&[
            ("align", SWITCH),
            ("attr", Value::OneOf(&["2"])),
            ("maxpct", Value::Number),
            ("nrext64", SWITCH),
            ("perblock", Value::Number),
            ("projid32bit", SWITCH),
            ("size", Value::Size),
            ("sparse", SWITCH),
        ]),
    ),
    (
        "-l",
        Value::Keys(&[
            ("agnum", Value::Number),
            ("internal", Value::Optional(&Value::OneOf(&["1"]))),
            ("lazy-count", SWITCH),
            ("size", Value::Size),
            ("su", Value::Size),
            ("sunit", Value::Number),
            ("version", Value::OneOf(&["2"])),
        ]),
    ),
    ("-L", Value::Label),
    ("-n", Value::Keys(&[("ftype", SWITCH), ("size", Value::Size), ("version", Value::OneOf(&["2", "ci"]))])),
    ("-q", Value::Nothing),
    ("-s", Value::Keys(&[("size", Value::Size), ("sectsize", Value::Size)])),
    ("-K", Value::Nothing),
];
