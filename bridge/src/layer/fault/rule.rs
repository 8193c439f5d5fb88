//! What is to go wrong, and when: rules, and their text form. Doing it is the layer's.

use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use rustix::io::Errno;

use crate::layer::settings::{SettingError, bytes, number, pairs, share};
use crate::random::Random;
use crate::{Operation, Request};

/// What happens to a request that a rule hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this errno, and nothing is done.
    Error(Errno),
    /// The first half of its range is done, then it fails with this errno: a torn write. Operations that change
    /// nothing just fail.
    Short(Errno),
    /// It is done this much later.
    Delay(Duration),
    /// It is done when [`super::FaultHandle::release`] is called, and not before.
    Hang,
}

/// Which of the requests that match a rule it hits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// All.
    Always,
    /// Each n-th: n, 2n, 3n. None for 0.
    Every(u64),
    /// This share, 0 to 1, chosen by the seed and the number of the request.
    Share(f64),
}

/// One thing that goes wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// What happens.
    pub effect: Effect,
    /// To which operation; None for all.
    pub operation: Option<Operation>,
    /// To requests that touch these bytes. A flush has no range: a rule that has one is about flushes only
    /// where it names the operation.
    pub range: Range<u64>,
    /// To which of those.
    pub when: When,
}

/// A seed and rules. Its text is `seed=7,error-rate=0.01,errno=EIO,delay-ms=5,delay-rate=0.1,op=read`; one text
/// names one operation and one range for all of its faults.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultConfig {
    /// Chooses which requests are hit: the same seed hits the same ones in the order they arrive.
    pub seed: u64,
    /// Each is considered for each request; delays add up.
    pub rules: Vec<Rule>,
}

const EVERYWHERE: Range<u64> = 0..u64::MAX;

const KNOWN: &str = "seed, op, offset, len, errno, error-rate, error-every, short-rate, delay-ms, delay-rate, hang-rate, hang-every";

impl Rule {
    /// Every request of every operation.
    pub fn new(effect: Effect) -> Self {
        Rule { effect, operation: None, range: EVERYWHERE, when: When::Always }
    }

    /// Only this operation.
    #[must_use]
    pub fn on(mut self, operation: Operation) -> Self {
        self.operation = Some(operation);
        self
    }

    /// Only requests that touch these bytes.
    #[must_use]
    pub fn within(mut self, range: Range<u64>) -> Self {
        self.range = range;
        self
    }

    /// Only some of them.
    #[must_use]
    pub fn when(mut self, when: When) -> Self {
        self.when = when;
        self
    }

    /// Whether the rule is about this request at all.
    pub(super) fn matches(&self, request: &Request) -> bool {
        let end = request.offset.saturating_add(request.len.max(1));
        let touches = match request.operation {
            Operation::Flush => self.range == EVERYWHERE || self.operation == Some(Operation::Flush),
            _ => request.offset < self.range.end && end > self.range.start,
        };
        touches && self.operation.is_none_or(|operation| operation == request.operation)
    }

    /// Whether it hits the `number`-th request that matches, counted from 1.
    pub(super) fn hits(&self, seed: u64, number: u64) -> bool {
        match self.when {
            When::Always => true,
            When::Every(n) => number.checked_rem(n) == Some(0),
            When::Share(share) => {
                Random::new(seed ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93)).chance(share)
            }
        }
    }
}

impl FromStr for FaultConfig {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        let (mut seed, mut operation, mut offset, mut len) = (None, None, 0, u64::MAX);
        let (mut errno, mut delay) = (None, None);
        let mut hits: [(&str, Option<When>); 4] =
            [("error", None), ("short", None), ("delay", None), ("hang", None)];
        for pair in pairs(text) {
            let (key, value) = pair?;
            match key {
                "seed" => seed = Some(number(key, value)?),
                "op" => operation = Some(operation_named(value)?),
                "offset" => offset = bytes(key, value)?,
                "len" => len = bytes(key, value)?,
                "errno" => errno = Some(errno_named(value)?),
                "delay-ms" => delay = Some(Duration::from_millis(number(key, value)?)),
                _ => {
                    let place = key.rsplit_once('-').and_then(|(what, how)| {
                        Some((hits.iter_mut().find(|(name, _)| *name == what)?, how))
                    });
                    let when = match (place, key) {
                        (Some((place, "rate")), _) => (place, When::Share(share(key, value)?)),
                        (Some((place, "every")), "error-every" | "hang-every") => {
                            (place, When::Every(number(key, value)?))
                        }
                        _ => {
                            let message = format!("unknown fault key `{key}`; there are {KNOWN}");
                            return Err(SettingError::new(message));
                        }
                    };
                    when.0.1 = Some(when.1);
                }
            }
        }
        let [(_, error), (_, short), (_, late), (_, hang)] = hits;
        if errno.is_some() && error.is_none() && short.is_none() {
            return Err(SettingError::new("errno needs error-rate, error-every or short-rate"));
        }
        if late.is_some() && delay.is_none() {
            return Err(SettingError::new("delay-rate needs delay-ms"));
        }
        let errno = errno.unwrap_or(Errno::IO);
        let rules = [
            error.map(|when| (Effect::Error(errno), when)),
            short.map(|when| (Effect::Short(errno), when)),
            delay.map(|delay| (Effect::Delay(delay), late.unwrap_or(When::Always))),
            hang.map(|when| (Effect::Hang, when)),
        ];
        let rules = rules.into_iter().flatten().map(|(effect, when)| {
            let range = offset..offset.saturating_add(len);
            Rule { effect, operation, range, when }
        });
        Ok(FaultConfig { seed: seed.unwrap_or_else(Random::any_seed), rules: rules.collect() })
    }
}

fn operation_named(name: &str) -> Result<Operation, SettingError> {
    Operation::ALL.into_iter().find(|operation| operation.name() == name).ok_or_else(|| {
        let names = Operation::ALL.map(Operation::name).join(", ");
        SettingError::new(format!("op: `{name}` is no operation; there are {names}"))
    })
}

fn errno_named(name: &str) -> Result<Errno, SettingError> {
    const NAMES: [(&str, Errno); 9] = [
        ("EIO", Errno::IO),
        ("ENOSPC", Errno::NOSPC),
        ("EDQUOT", Errno::DQUOT),
        ("EPERM", Errno::PERM),
        ("EROFS", Errno::ROFS),
        ("EINVAL", Errno::INVAL),
        ("ENOMEM", Errno::NOMEM),
        ("EOPNOTSUPP", Errno::OPNOTSUPP),
        ("ETIMEDOUT", Errno::TIMEDOUT),
    ];
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, errno)| *errno).ok_or_else(|| {
        let names = NAMES.map(|(name, _)| name).join(", ");
        SettingError::new(format!("errno: `{name}` is not known; there are {names}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form() {
        let text = "seed=7,error-rate=0.01,errno=ENOSPC,delay-ms=5,delay-rate=0.1,op=read,offset=4K,len=1M";
        let rule =
            |effect, when| Rule::new(effect).on(Operation::Read).within(4096..4096 + (1 << 20)).when(when);
        let expected = FaultConfig {
            seed: 7,
            rules: vec![
                rule(Effect::Error(Errno::NOSPC), When::Share(0.01)),
                rule(Effect::Delay(Duration::from_millis(5)), When::Share(0.1)),
            ],
        };
        assert_eq!(text.parse(), Ok(expected));
        let config: FaultConfig = "hang-every=3,short-rate=1,offset=1".parse().unwrap();
        assert_eq!(
            config.rules[0],
            Rule::new(Effect::Short(Errno::IO)).within(1..u64::MAX).when(When::Share(1.0))
        );
        assert_eq!(config.rules[1].when, When::Every(3));
        assert_eq!("delay-ms=1".parse::<FaultConfig>().unwrap().rules[0].when, When::Always);
        assert!("".parse::<FaultConfig>().unwrap().rules.is_empty());
    }

    #[test]
    fn a_range_is_not_about_flushes_unless_it_says_so() {
        let rule = Rule::new(Effect::Hang);
        assert!(
            rule.matches(&Request::flush()) && rule.clone().on(Operation::Flush).matches(&Request::flush())
        );
        let ranged = rule.within(5..10);
        assert!(
            !ranged.matches(&Request::flush())
                && ranged.clone().on(Operation::Flush).matches(&Request::flush())
        );
        let matched = |offset, len| ranged.matches(&Request::new(Operation::Read, offset, len));
        assert!(matched(0, 6) && matched(9, 1) && matched(5, 0) && !matched(0, 5) && !matched(10, 0));
    }

    #[test]
    fn refusals_name_the_key() {
        for (text, part) in [
            ("err-rate=1", "unknown fault key `err-rate`; there are seed, op"),
            ("delay-every=1", "unknown fault key `delay-every`"),
            ("op=wrote", "op: `wrote`"),
            ("errno=EFOO,error-rate=1", "errno: `EFOO`"),
            ("error-rate=2", "error-rate: `2`"),
            ("errno=EIO", "errno needs"),
            ("delay-rate=1", "delay-rate needs"),
        ] {
            let error = text.parse::<FaultConfig>().unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
