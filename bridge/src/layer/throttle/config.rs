//! What a throttle is set to, with QEMU's key names, meaning and checks (its `docs/throttle.txt`).
//! Text to values and back; the arithmetic is the bucket's.

use std::fmt;
use std::str::FromStr;

use crate::layer::settings::{SettingError, bytes, number, pairs};

/// The largest rate, per second: QEMU's.
pub const MAX_RATE: u64 = 1_000_000_000_000_000;

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Units per second in the long run; 0 for no limit. At most [`MAX_RATE`].
    pub avg: u64,
    /// Units per second while a burst lasts, at least `avg`; 0 for no burst. At most [`MAX_RATE`].
    pub max: u64,
    /// How long a burst may last, in seconds; at least 1, and 1 where there is no burst.
    pub max_length: u64,
}

/// The limits of one unit: together, or reads and writes apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Reads and writes together.
    pub total: Limit,
    /// Reads alone.
    pub read: Limit,
    /// Writes alone.
    pub write: Limit,
}

/// Everything a throttle can be set to. Its text is `iops-total=1000,bps-read=50M`: rates per second, sizes in
/// bytes with K, M, G or T for powers of 1024. The default is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleConfig {
    /// Operations per second.
    pub iops: Limits,
    /// Bytes per second.
    pub bps: Limits,
    /// Requests larger than this number of bytes count as several operations, in proportion; 0 for never.
    pub iops_size: u64,
}

const KNOWN: &str = "iops-total, iops-read, iops-write, bps-total, bps-read, bps-write (each also with -max and \
                     -max-length), iops-size";

impl Default for Limit {
    fn default() -> Self {
        Limit { avg: 0, max: 0, max_length: 1 }
    }
}

impl ThrottleConfig {
    /// Whether anything is limited.
    pub fn is_limited(&self) -> bool {
        self.named().iter().any(|(_, limit)| limit.avg > 0)
    }

    /// Makes the checks that QEMU makes.
    ///
    /// # Errors
    /// A line that names the key: where a total stands beside a read or write limit, a burst has no limit, is
    /// lower than it, or has no sensible length, a rate is above [`MAX_RATE`], or `iops-size` has no iops limit.
    pub fn check(&self) -> Result<(), SettingError> {
        let fail = |text: String| Err(SettingError::new(text));
        for (unit, limits) in [("iops", &self.iops), ("bps", &self.bps)] {
            let Limits { total, read, write } = limits;
            if (total.avg > 0 && (read.avg > 0 || write.avg > 0))
                || (total.max > 0 && (read.max > 0 || write.max > 0))
            {
                return fail(format!(
                    "{unit}-total excludes {unit}-read and {unit}-write: set one or the others"
                ));
            }
        }
        for (name, limit) in self.named() {
            let Limit { avg, max, max_length } = limit;
            if avg > MAX_RATE || max > MAX_RATE {
                return fail(format!("{name}: a rate is at most {MAX_RATE} per second"));
            }
            if max_length == 0 {
                return fail(format!("{name}-max-length: a burst lasts at least 1 second"));
            }
            if max_length > 1 && max == 0 {
                return fail(format!("{name}-max-length needs {name}-max"));
            }
            if max > 0 && max_length > MAX_RATE / max {
                return fail(format!("{name}-max-length: too long for a burst of {max} per second"));
            }
            if max > 0 && avg == 0 {
                return fail(format!("{name}-max needs {name}"));
            }
            if max > 0 && max < avg {
                return fail(format!("{name}-max is lower than {name}"));
            }
        }
        let Limits { total, read, write } = self.iops;
        if self.iops_size > 0 && total.avg + read.avg + write.avg == 0 {
            return fail("iops-size needs iops-total, iops-read or iops-write".to_owned());
        }
        Ok(())
    }

    /// These limits with the changes of a text, in which 0 takes a limit away; all other limits stay.
    ///
    /// # Errors
    /// As for reading a whole text; it is the outcome that is checked.
    pub fn changed(mut self, text: &str) -> Result<Self, SettingError> {
        for pair in pairs(text) {
            let (key, value) = pair?;
            let Some((place, in_bytes)) = self.place(key) else {
                return Err(SettingError::new(format!("unknown throttle key `{key}`; there are {KNOWN}")));
            };
            *place = if in_bytes { bytes(key, value)? } else { number(key, value)? };
        }
        self.check()?;
        Ok(self)
    }

    /// What is set, each key with its value; empty where nothing is limited.
    pub fn settings(&self) -> Vec<(String, u64)> {
        let mut settings = Vec::new();
        let mut put = |key: &str, part: &str, value: u64, default: u64| {
            if value != default {
                settings.push((format!("{key}{part}"), value));
            }
        };
        for (name, limit) in self.named() {
            put(name, "", limit.avg, 0);
            put(name, "-max", limit.max, 0);
            put(name, "-max-length", limit.max_length, 1);
        }
        put("iops-size", "", self.iops_size, 0);
        settings
    }

    fn named(&self) -> [(&'static str, Limit); 6] {
        [
            ("iops-total", self.iops.total),
            ("iops-read", self.iops.read),
            ("iops-write", self.iops.write),
            ("bps-total", self.bps.total),
            ("bps-read", self.bps.read),
            ("bps-write", self.bps.write),
        ]
    }

    /// The place that a key names, and whether it takes a number of bytes; None for an unknown key. Apart from
    /// ours, QEMU's other spellings are known: `throttling.iops-total`, `x-iops-total`, `iops`, `bps_rd_max`.
    fn place(&mut self, key: &str) -> Option<(&mut u64, bool)> {
        let key = key.strip_prefix("throttling.").or_else(|| key.strip_prefix("limits.")).unwrap_or(key);
        let key = key.strip_prefix("x-").unwrap_or(key).replace('_', "-");
        if key == "iops-size" {
            return Some((&mut self.iops_size, true));
        }
        let (unit, rest) = key.split_once('-').unwrap_or((&key, ""));
        let (limits, in_bytes) = match unit {
            "iops" => (&mut self.iops, false),
            "bps" => (&mut self.bps, true),
            _ => return None,
        };
        let (direction, part) = match rest.split_once('-') {
            _ if rest == "max" || rest == "max-length" => ("total", rest),
            Some((direction, part)) => (direction, part),
            None => (rest, ""),
        };
        let limit = match direction {
            "total" | "" => &mut limits.total,
            "read" | "rd" => &mut limits.read,
            "write" | "wr" => &mut limits.write,
            _ => return None,
        };
        match part {
            "" => Some((&mut limit.avg, in_bytes)),
            "max" => Some((&mut limit.max, in_bytes)),
            "max-length" => Some((&mut limit.max_length, false)),
            _ => None,
        }
    }
}

impl FromStr for ThrottleConfig {
    type Err = SettingError;

    /// Reads and checks; where a key comes twice, the later one counts.
    fn from_str(text: &str) -> Result<Self, SettingError> {
        ThrottleConfig::default().changed(text)
    }
}

/// The text that reads back as the same value; empty where nothing is limited.
impl fmt::Display for ThrottleConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = self.settings().into_iter().map(|(key, value)| format!("{key}={value}"));
        f.write_str(&pairs.collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ThrottleConfig {
        text.parse().unwrap()
    }

    #[test]
    fn text_and_back() {
        let config = parse("iops-total=1000,bps-read=50M,bps-read-max=1G,bps-read-max-length=7,iops-size=4K");
        assert_eq!(config.iops.total.avg, 1000);
        assert_eq!(config.bps.read, Limit { avg: 50 << 20, max: 1 << 30, max_length: 7 });
        assert_eq!(config.iops_size, 4096);
        assert_eq!(parse(&config.to_string()), config);
        assert_eq!(parse("").to_string(), "");
        assert!(config.is_limited() && !parse("iops-total=0").is_limited());
    }

    #[test]
    fn changes_leave_the_rest() {
        let before = parse("iops-read=10,bps-total=1M");
        let after = before.changed("bps-total=2M,iops-write=5").unwrap();
        assert_eq!(after.to_string(), "iops-read=10,iops-write=5,bps-total=2097152");
        assert_eq!(after.settings()[1], ("iops-write".to_owned(), 5));
        let total = before.changed("iops-total=7,iops-read=0").unwrap();
        assert_eq!(total.to_string(), "iops-total=7,bps-total=1048576");
        assert_eq!(before.changed("").unwrap(), before);
        assert!(before.changed("iops-total=7").unwrap_err().to_string().contains("iops-total excludes"));
        assert!(before.changed("ops=1").unwrap_err().to_string().contains("there are iops-total"));
    }

    #[test]
    fn every_key_in_every_spelling() {
        for (unit, short) in [("iops", "iops"), ("bps", "bps")] {
            for (direction, qmp) in [("total", ""), ("read", "_rd"), ("write", "_wr")] {
                let name = format!("{unit}-{direction}");
                let text = format!("{name}=5,{name}-max=6,{name}-max-length=7");
                let ours = parse(&text);
                assert_eq!(ours.to_string(), text);
                let qemu = format!(
                    "throttling.{name}=5,x-{name}-max=6,{short}{qmp}_max_length=7,{short}{qmp}=5,{short}{qmp}_max=6"
                );
                assert_eq!(parse(&qemu), ours, "{qemu}");
            }
        }
    }

    #[test]
    fn refusals_name_the_key() {
        for (text, part) in [
            ("iops-totl=1", "`iops-totl`; there are iops-total, iops-read"),
            ("iops-size-max=1", "`iops-size-max`"),
            ("iops-total-max-length-x=1", "unknown"),
            ("ops=1", "unknown"),
            ("iops-total", "no `key=value`"),
            ("iops-total=1K", "iops-total: `1K` is no whole number"),
            ("bps-total=1X", "bps-total: `1X` is no size"),
            ("iops-total=1,iops-read=1", "iops-total excludes"),
            ("bps-total=1,bps-write=1", "bps-total excludes"),
            ("bps-total-max=10", "bps-total-max needs bps-total"),
            ("bps-total=10,bps-total-max=9", "lower"),
            ("iops-read=10,iops-read-max-length=9", "iops-read-max-length needs iops-read-max"),
            ("iops-read=10,iops-read-max=20,iops-read-max-length=0", "at least 1 second"),
            ("iops-read=10,iops-read-max=1000000000000,iops-read-max-length=1001", "too long"),
            ("bps-read=1000000000000001", "at most"),
            ("iops-size=4K", "iops-size needs"),
            ("bps-total=1M,iops-size=4K", "iops-size needs"),
        ] {
            let error = text.parse::<ThrottleConfig>().unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
