//! What is said of resizes and snapshots.

use std::fmt::Write;

use serde_json::json;

use super::say;
use crate::control::command::table;
use crate::output::plain;
use crate::size::{NewSize, human};
use crate::volume::{Name, Pool, Progress, Resized, Result, Taken};

/// Makes a volume larger.
pub(super) fn resize(
    pool: &Pool,
    name: &Name,
    size: NewSize,
    progress: &dyn Progress,
    json: bool,
) -> Result<String> {
    let resized = pool.resize(name, size, progress)?;
    say(json, &resized, || {
        let Resized { old_size, size, later } = &resized;
        let was = if old_size == size { String::new() } else { format!(" (was {})", human(*old_size)) };
        let mut text = format!("{name}: {} now{was}\n", human(*size));
        if let Some(why) = later {
            let _ = writeln!(text, "its users see that when it is next mounted: {}", plain(why));
        }
        text
    })
}

/// A row for each snapshot.
pub(super) fn snapshots(pool: &Pool, name: &Name, json: bool) -> Result<String> {
    let all = pool.snapshots(name)?;
    say(json, &json!({ "name": name, "snapshots": all }), || {
        let head = ["SNAPSHOT", "SIZE", "ALLOCATED", "FS", "FORMAT"].map(str::to_owned);
        let rows = all.iter().map(|one| {
            vec![
                format!("{name}@{}", one.name),
                human(one.size),
                human(one.allocated),
                one.fs.to_string(),
                one.format.to_string(),
            ]
        });
        table(&std::iter::once(head.to_vec()).chain(rows).collect::<Vec<_>>())
    })
}

/// A snapshot that was just taken.
pub(super) fn taken(volume: &Name, taken: &Taken, json: bool) -> Result<String> {
    say(json, taken, || {
        let how = if taken.reflink { "sharing the volume's blocks" } else { "copied" };
        format!("{volume}@{}: {}, {how}\n", taken.snapshot.name, human(taken.snapshot.size))
    })
}
