//! What goes over the control socket, as JSON: the answers of `/v1/...`. Fields may be added within v1, and a reader
//! skips those it does not know.

use std::collections::BTreeMap;

use bridge::stats::{LATENCY_BUCKETS, OperationStats};
use bridge::{Export, Operation};
use serde::{Deserialize, Serialize};

use crate::os_text::OsText;

/// `GET /v1/instance`: a process that serves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Instance {
    pub(crate) pid: u32,
    /// The program's.
    pub(crate) version: String,
    /// When it was ready, in seconds since 1970.
    pub(crate) started: u64,
    pub(crate) exports: Vec<ExportInfo>,
    pub(crate) doors: Vec<DoorInfo>,
}

/// One export of an instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ExportInfo {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    /// Where its blocks come from; a path is absolute.
    pub(crate) source: OsText,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    /// Why writes that were answered and not flushed do not survive a crash of the process; None where they do.
    #[serde(default)]
    pub(crate) loss_after_crash: Option<String>,
    pub(crate) limits: Limits,
    /// Limits that it shares with other exports, by the group's name.
    #[serde(default)]
    pub(crate) groups: BTreeMap<String, Limits>,
}

/// Throttle keys that are set; none of them means no limit.
pub(crate) type Limits = BTreeMap<String, u64>;

/// One door of an instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DoorInfo {
    /// The command that opens it: `net`, for one.
    pub(crate) kind: String,
    pub(crate) places: Vec<Place>,
    #[serde(flatten)]
    pub(crate) report: ClientReport,
}

/// Where an export is found: a URI, a device, a path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The export's name.
    pub(crate) export: String,
    pub(crate) at: OsText,
}

/// The clients of one door.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ClientReport {
    pub(crate) clients: Vec<Client>,
    /// Workers that were too busy to say who their clients are.
    pub(crate) silent_workers: usize,
}

/// One client, past its handshake.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Client {
    pub(crate) peer: String,
    /// The export's name.
    pub(crate) export: String,
    /// Requests that are not answered yet.
    pub(crate) in_flight: u32,
    /// On the wire, headers included.
    pub(crate) received_bytes: u64,
    /// On the wire, headers included.
    pub(crate) sent_bytes: u64,
    pub(crate) connected_s: u64,
}

/// `GET /v1/stats`: the counters of one export, over all doors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ExportStats {
    pub(crate) export: String,
    /// By the operation's name; one that never came is there with zeroes.
    pub(crate) operations: BTreeMap<String, OperationCount>,
}

/// The counters of one operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct OperationCount {
    /// Requests that were answered, errors included.
    pub(crate) count: u64,
    /// Bytes of those that succeeded.
    pub(crate) bytes: u64,
    pub(crate) errors: u64,
    pub(crate) latency_us: Percentiles,
    /// The buckets that are not empty, each with latencies that no earlier one counts.
    pub(crate) histogram: Vec<Bucket>,
}

/// Upper bounds in microseconds; None before the first request, and above the last bound.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Percentiles {
    pub(crate) p50: Option<u64>,
    pub(crate) p99: Option<u64>,
    pub(crate) p999: Option<u64>,
}

/// So many requests took less than this time.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Bucket {
    /// None in the last one: whatever took longer.
    pub(crate) below_us: Option<u64>,
    pub(crate) count: u64,
}

/// The longest time in microseconds that has an upper bound.
pub(crate) const LAST_BOUND_US: u64 = 1 << (LATENCY_BUCKETS - 2);

/// Any answer of `/v1/throttle`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Throttle {
    pub(crate) export: String,
    pub(crate) limits: Limits,
    /// As in [`ExportInfo::groups`].
    #[serde(default)]
    pub(crate) groups: BTreeMap<String, Limits>,
}

/// The body of `POST /v1/resize`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct ResizeWish {
    /// In bytes.
    pub(crate) size: u64,
}

/// The answer to `POST /v1/resize`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Resized {
    pub(crate) export: String,
    pub(crate) old_size: u64,
    pub(crate) size: u64,
    /// What has not grown with it, and why: a line for each door.
    #[serde(default)]
    pub(crate) fixed: Vec<String>,
}

/// Any answer that is not a success: one line for a person.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) error: String,
}

impl ExportStats {
    pub(crate) fn of(export: &Export) -> Self {
        let stats = export.stats();
        let count = |operation: Operation| (operation.name().to_owned(), stats.of(operation).into());
        let operations = Operation::ALL.into_iter().map(count).collect();
        ExportStats { export: export.name().to_owned(), operations }
    }
}

impl From<OperationStats> for OperationCount {
    fn from(stats: OperationStats) -> Self {
        let bounded = |us: u64| Some(us).filter(|us| *us <= LAST_BOUND_US);
        let under = |share| stats.latency_us(share).and_then(bounded);
        let buckets = stats.latency.iter().enumerate().filter(|(_, count)| **count > 0);
        OperationCount {
            count: stats.count,
            bytes: stats.bytes,
            errors: stats.errors,
            latency_us: Percentiles { p50: under(0.5), p99: under(0.99), p999: under(0.999) },
            histogram: buckets
                .map(|(n, count)| Bucket { below_us: bounded(1 << n), count: *count })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn latencies_without_a_bound_have_none() {
        let stats = bridge::stats::Stats::new();
        for seconds in [0, 0, 3, 60] {
            stats.record(Operation::Read, 1, true, true, Duration::from_secs(seconds));
        }
        let count = OperationCount::from(stats.of(Operation::Read));
        assert_eq!((count.latency_us.p50, count.latency_us.p99), (Some(1), None));
        let bounds: Vec<_> = count.histogram.iter().map(|bucket| (bucket.below_us, bucket.count)).collect();
        assert_eq!(bounds, [(Some(1), 2), (Some(LAST_BOUND_US), 1), (None, 1)]);
    }
}
