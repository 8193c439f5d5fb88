//! Options of btrfs and mkfs.btrfs (btrfs(5), mkfs.btrfs(8)) that do no harm outside of the volume.
//!
//! Left out are those that name a device or a file (`device`, `--rootdir`), spread over several devices (raid profiles,
//! `degraded`), decide what an error does to the host (`fatal_errors`), or make nothing (`-V`, `-O list-all`).

use super::value::{Known, Value};

const ALGORITHM: Value = Value::Level(&["zlib", "lzo", "zstd", "no", "none"]);

pub(super) const MOUNT: &[Known] = &[
    ("acl", Value::Nothing),
    ("noacl", Value::Nothing),
    ("autodefrag", Value::Nothing),
    ("noautodefrag", Value::Nothing),
    ("barrier", Value::Nothing),
    ("nobarrier", Value::Nothing),
    ("clear_cache", Value::Nothing),
    ("commit", Value::Number),
    ("compress", Value::Optional(&ALGORITHM)),
    ("compress-force", Value::Optional(&ALGORITHM)),
    ("datacow", Value::Nothing),
    ("nodatacow", Value::Nothing),
    ("datasum", Value::Nothing),
    ("nodatasum", Value::Nothing),
    ("discard", Value::Optional(&Value::OneOf(&["sync", "async"]))),
    ("nodiscard", Value::Nothing),
    ("flushoncommit", Value::Nothing),
    ("noflushoncommit", Value::Nothing),
    ("max_inline", Value::Size),
    ("metadata_ratio", Value::Number),
    ("skip_balance", Value::Nothing),
    ("space_cache", Value::Optional(&Value::OneOf(&["v1", "v2"]))),
    ("nospace_cache", Value::Nothing),
    ("ssd", Value::Nothing),
    ("ssd_spread", Value::Nothing),
    ("nossd", Value::Nothing),
    ("nossd_spread", Value::Nothing),
    ("subvol", Value::Label),
    ("subvolid", Value::Number),
    ("treelog", Value::Nothing),
    ("notreelog", Value::Nothing),
    ("user_subvol_rm_allowed", Value::Nothing),
];

const PROFILE: Value = Value::OneOf(&["single", "dup"]);
const CHECKSUM: Value = Value::OneOf(&["crc32c", "xxhash", "sha256", "blake2"]);
const FEATURES: Value = Value::Features(&[
    "block-group-tree",
    "extref",
    "free-space-tree",
    "mixed-bg",
    "no-holes",
    "quota",
    "skinny-metadata",
    "squota",
]);

pub(super) const MKFS: &[Known] = &[
    ("-d", PROFILE),
    ("--data", PROFILE),
    ("-m", PROFILE),
    ("--metadata", PROFILE),
    ("-M", Value::Nothing),
    ("--mixed", Value::Nothing),
    ("--csum", CHECKSUM),
    ("--checksum", CHECKSUM),
    ("-n", Value::Size),
    ("--nodesize", Value::Size),
    ("-s", Value::Size),
    ("--sectorsize", Value::Size),
    ("-O", FEATURES),
    ("--features", FEATURES),
    ("-R", FEATURES),
    ("--runtime-features", FEATURES),
    ("-L", Value::Label),
    ("--label", Value::Label),
    ("-U", Value::Uuid(&[])),
    ("--uuid", Value::Uuid(&[])),
    ("-K", Value::Nothing),
    ("--nodiscard", Value::Nothing),
    ("-f", Value::Nothing),
    ("--force", Value::Nothing),
    ("-q", Value::Nothing),
    ("--quiet", Value::Nothing),
];
