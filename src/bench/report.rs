//! The result, for people and for programs; and whether it is one.

use std::fmt::Write;

use anyhow::{Result, bail};
use nbd_proto::{Negotiated, ReplyStyle};

use super::plan::Plan;
use super::tally::{ERRORS, Kind, Tally};
use crate::cli::BenchArgs;
use crate::size;

/// A finished run.
pub(super) struct Report<'a> {
    pub(super) args: &'a BenchArgs,
    pub(super) plan: &'a Plan,
    pub(super) export: &'a Negotiated,
    pub(super) tally: &'a Tally,
}

impl Report<'_> {
    /// A few lines.
    pub(super) fn text(&self) -> String {
        let (args, tally) = (self.args, self.tally);
        let mut text = format!(
            "{}: {} of {}, {} replies\n{} connection{}, {} deep, {} blocks of {}, seed {:#x}\n",
            args.uri,
            size::human(self.plan.bytes()),
            size::human(self.export.info.size),
            self.style(),
            args.connections,
            if args.connections == 1 { "" } else { "s" },
            args.depth,
            self.access(),
            size::exact(args.block_size.into()),
            args.seed,
        );
        for kind in Kind::ALL {
            let latency = &tally.latency[kind as usize];
            if latency.count() == 0 {
                continue;
            }
            let us = |ns: u64| ns as f64 / 1e3;
            let _ = writeln!(
                text,
                "{:<5}  {:.0} IOPS, {:.1} MB/s; latency in us: mean {:.1}, p50 {:.1}, p99 {:.1}, p99.9 {:.1}, \
                 max {:.1}",
                kind.name(),
                self.per_second(latency.count()),
                self.per_second(tally.bytes[kind as usize]) / 1e6,
                us(latency.mean_ns()),
                us(latency.percentile_ns(500)),
                us(latency.percentile_ns(990)),
                us(latency.percentile_ns(999)),
                us(latency.max_ns()),
            );
        }
        let _ = writeln!(
            text,
            "{} requests in {:.2} s; this program's CPU time: {:.2} us each",
            tally.requests(),
            self.seconds(),
            self.cpu_us()
        );
        if args.verify {
            let _ = writeln!(
                text,
                "verified: {} blocks are right, {} wrong, {} hold nothing to check",
                tally.verified, tally.mismatches, tally.unknown
            );
        }
        text
    }

    /// One object on one line. Nothing in it needs escapes: a URI is written in ASCII without quotes.
    pub(super) fn json(&self) -> String {
        let (args, tally) = (self.args, self.tally);
        let mut json = format!(
            "{{\"uri\": \"{}\", \"size\": {}, \"style\": \"{}\", \"connections\": {}, \"depth\": {}, \
             \"block_size\": {}, \"access\": \"{}\", \"read_percent\": {}, \"seed\": \"{:#x}\", \
             \"seconds\": {:.6}, \"requests\": {}, \"client_cpu_us\": {:.4}",
            args.uri,
            self.export.info.size,
            self.style(),
            args.connections,
            args.depth,
            args.block_size,
            self.access(),
            args.read_percent,
            args.seed,
            self.seconds(),
            tally.requests(),
            self.cpu_us(),
        );
        for kind in Kind::ALL {
            let (latency, bytes) = (&tally.latency[kind as usize], tally.bytes[kind as usize]);
            let _ = write!(
                json,
                ", \"{}\": {{\"requests\": {}, \"bytes\": {bytes}, \"iops\": {:.1}, \"bytes_per_second\": {:.1}, \
                 \"latency_ns\": {{\"mean\": {}, \"p50\": {}, \"p99\": {}, \"p99_9\": {}, \"max\": {}}}}}",
                kind.name(),
                latency.count(),
                self.per_second(latency.count()),
                self.per_second(bytes),
                latency.mean_ns(),
                latency.percentile_ns(500),
                latency.percentile_ns(990),
                latency.percentile_ns(999),
                latency.max_ns(),
            );
        }
        let errors = ERRORS.iter().zip(tally.errors).filter(|(_, count)| *count > 0);
        let errors: Vec<_> = errors.map(|(error, count)| format!("\"{error}\": {count}")).collect();
        let _ = write!(json, ", \"errors\": {{{}}}", errors.join(", "));
        if args.verify {
            let _ = write!(
                json,
                ", \"verify\": {{\"right\": {}, \"wrong\": {}, \"unknown\": {}}}",
                tally.verified, tally.mismatches, tally.unknown
            );
        }
        json.push_str("}\n");
        json
    }

    /// Whether everything went well.
    ///
    /// # Errors
    /// One line that says what did not.
    pub(super) fn verdict(&self) -> Result<()> {
        let tally = self.tally;
        if let Some(first) = &tally.first_mismatch {
            bail!("{} of the blocks read are wrong: {first}", tally.mismatches);
        }
        if tally.failures() > 0 {
            let errors = ERRORS.iter().zip(tally.errors).filter(|(_, count)| *count > 0);
            let errors: Vec<_> = errors.map(|(error, count)| format!("{count} times {error}")).collect();
            bail!("{} requests failed: {}", tally.failures(), errors.join(", "));
        }
        if self.args.verify && tally.verified == 0 {
            bail!(
                "no block was checked: none that was read carries the pattern of seed {:#x} in blocks of {}",
                self.args.seed,
                size::exact(self.args.block_size.into())
            );
        }
        Ok(())
    }

    fn style(&self) -> &'static str {
        match self.export.style {
            ReplyStyle::Simple => "simple",
            ReplyStyle::Structured => "structured",
            ReplyStyle::Extended => "extended",
        }
    }

    fn access(&self) -> &'static str {
        if self.args.sequential { "sequential" } else { "random" }
    }

    fn seconds(&self) -> f64 {
        self.tally.elapsed_ns as f64 / 1e9
    }

    fn per_second(&self, number: u64) -> f64 {
        if self.tally.elapsed_ns == 0 { 0.0 } else { number as f64 / self.seconds() }
    }

    /// Processor time for each request, in microseconds.
    fn cpu_us(&self) -> f64 {
        self.tally.cpu_ns as f64 / 1e3 / self.tally.requests().max(1) as f64
    }
}
