//! `--throttle`: which limits an export has, by itself and together with others.
//!
//! | words | limits of |
//! |---|---|
//! | `iops-total=1000` | each export by itself |
//! | `export=a,iops-total=1000` | `a` by itself; over what each one has |
//! | `group=g,bps-total=50M` | all exports together |
//! | `group=g,export=a,export=b,bps-total=50M` | these two together |
//!
//! The same words again add to what was said, and a later value counts. An export can be in several groups.

use anyhow::Result;
use bridge::Backend;
use bridge::layer::{Throttle, ThrottleConfig, ThrottleHandle};

use crate::cli::{ExportArg, UsageError};

/// Limits by the names of their groups.
type Named = Vec<(String, ThrottleHandle)>;

/// What all `--throttle` options together say.
pub(super) struct Limits {
    /// Of each export by itself: the export, or None for every one; then its settings.
    own: Vec<(Option<String>, String)>,
    groups: Vec<Group>,
}

struct Group {
    name: String,
    /// None is every one.
    members: Vec<Option<String>>,
    settings: String,
    /// The limits that its members share, once they are known to be right.
    shared: Option<ThrottleHandle>,
}

impl Limits {
    /// Reads the options, for these exports.
    ///
    /// # Errors
    /// One line that names the key or the export.
    pub(super) fn parse(options: &[String], exports: &[ExportArg]) -> Result<Self> {
        let mut limits = Limits { own: Vec::new(), groups: Vec::new() };
        for option in options {
            limits.add(option, exports)?;
        }
        for (_, settings) in &limits.own {
            config(settings)?;
        }
        for group in &mut limits.groups {
            group.shared = Some(ThrottleHandle::new(config(&group.settings)?).map_err(usage)?);
        }
        Ok(limits)
    }

    fn add(&mut self, option: &str, exports: &[ExportArg]) -> Result<()> {
        let (mut group, mut members, mut settings) = (None, Vec::new(), Vec::new());
        for pair in option.split(',') {
            match pair.split_once('=').map(|(key, value)| (key.trim(), value)) {
                Some(("group", "")) => return Err(usage("group: a name is missing")),
                Some(("group", name)) => group = Some(name),
                Some(("export", name)) if exports.iter().any(|export| export.name == name) => {
                    members.push(Some(name.to_owned()));
                }
                Some(("export", name)) => return Err(usage(format!("no export is named `{name}`"))),
                _ => settings.push(pair),
            }
        }
        let settings = settings.join(",");
        let Some(name) = group else {
            if members.is_empty() {
                members.push(None);
            }
            self.own.extend(members.into_iter().map(|member| (member, settings.clone())));
            return Ok(());
        };
        match self.groups.iter_mut().find(|group| group.name == name) {
            Some(group) => {
                group.members.extend(members);
                group.settings = format!("{},{settings}", group.settings);
            }
            None => self.groups.push(Group { name: name.to_owned(), members, settings, shared: None }),
        }
        Ok(())
    }

    /// Puts an export behind its limits: the ones of its groups, which are given by their names, and above them its own.
    ///
    /// # Errors
    /// One line, where words that are right by themselves are not so together.
    pub(super) fn lay(&self, mut stack: Box<dyn Backend>, export: &str) -> Result<(Throttle, Named)> {
        let mut groups = Vec::new();
        for group in &self.groups {
            let member =
                group.members.is_empty() || group.members.iter().flatten().any(|name| name == export);
            if let (true, Some(shared)) = (member, &group.shared) {
                stack = Box::new(Throttle::join(stack, shared));
                groups.push((group.name.clone(), shared.clone()));
            }
        }
        // What is said of one export counts over what is said of every one.
        let mut settings = Vec::new();
        for member in [None, Some(export)] {
            let own = self.own.iter().filter(|(name, _)| name.as_deref() == member);
            settings.extend(own.map(|(_, settings)| settings.as_str()));
        }
        Ok((Throttle::new(stack, config(&settings.join(","))?).map_err(usage)?, groups))
    }
}

fn config(settings: &str) -> Result<ThrottleConfig> {
    settings.parse().map_err(usage)
}

fn usage(error: impl std::fmt::Display) -> anyhow::Error {
    UsageError::new(format!("--throttle: {error}")).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Source;
    use bridge::Flags;
    use bridge::backend::null::NullBackend;

    fn exports() -> Vec<ExportArg> {
        let named = |name: &str| ExportArg {
            name: name.into(),
            description: None,
            source: Source::Null(1 << 30),
            options: Default::default(),
        };
        ["", "a", "b"].map(named).to_vec()
    }

    fn parse(options: &[&str]) -> Result<Limits> {
        Limits::parse(&options.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>(), &exports())
    }

    /// How many reads each of the exports can make at once, in this order.
    fn at_once(options: &[&str], order: &[&str]) -> Vec<usize> {
        let limits = parse(options).unwrap();
        let stack = |name: &&str| limits.lay(Box::new(NullBackend::new(1 << 30)), name).unwrap().0;
        let stacks: Vec<_> = order.iter().map(stack).collect();
        let reads = |stack: &Throttle| {
            (0..5000).take_while(|_| stack.try_read(0, &mut [0], Flags::NONE).is_some()).count()
        };
        stacks.iter().map(reads).collect()
    }

    /// A bucket holds a tenth of a second and one more; it leaks a little while it is filled.
    fn about(found: &[usize], expected: &[usize]) {
        let near =
            |(found, expected): (&usize, &usize)| (*expected..expected + 1 + expected / 5).contains(found);
        assert!(
            found.len() == expected.len() && found.iter().zip(expected).all(near),
            "{found:?} {expected:?}"
        );
    }

    #[test]
    fn each_by_itself_and_one_of_them() {
        about(&at_once(&["iops-total=100"], &["", "a", "b"]), &[11, 11, 11]);
        about(&at_once(&["iops-total=100", "export=a,iops-total=500"], &["", "a"]), &[11, 51]);
        about(&at_once(&["export=,export=b,iops-read=100"], &["b", "a", ""])[..1], &[11]);
        assert_eq!(at_once(&["export=b,iops-read=100", ""], &["a"]), [5000]);
    }

    #[test]
    fn groups_share() {
        about(&at_once(&["group=g,iops-total=100"], &["a", "b", ""]), &[11, 0, 0]);
        about(&at_once(&["group=g,export=a,iops-total=100", "group=g,export=b"], &["b", "a"]), &[11, 0]);
        assert_eq!(at_once(&["group=g,export=a,export=b,iops-total=100"], &[""]), [5000]);
        let limits = parse(&["group=g,iops-total=5", "group=h,export=a,bps-read=7"]).unwrap();
        let groups = |name: &str| -> Vec<(String, String)> {
            let (_, groups) = limits.lay(Box::new(NullBackend::new(1)), name).unwrap();
            groups.into_iter().map(|(name, shared)| (name, shared.config().to_string())).collect()
        };
        let named = |name: &str, config: &str| (name.to_owned(), config.to_owned());
        assert_eq!(groups("a"), [named("g", "iops-total=5"), named("h", "bps-read=7")]);
        assert_eq!(groups("b"), [named("g", "iops-total=5")]);
        about(&at_once(&["group=g,iops-total=500", "export=a,iops-total=100"], &["a", "b"]), &[11, 40]);
    }

    #[test]
    fn what_makes_no_sense() {
        for (options, words) in [
            (&["iops-totl=1"][..], "unknown throttle key"),
            (&["group=,iops-total=1"], "a name is missing"),
            (&["export=c,iops-total=1"], "no export is named `c`"),
            (&["group=g,iops-total=1", "group=g,iops-read=1"], "iops-total excludes"),
        ] {
            let error = parse(options).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.starts_with("--throttle: ") && error.contains(words), "{options:?}: {error}");
        }
        let limits = parse(&["iops-total=1", "export=a,iops-read=1"]).unwrap();
        assert!(limits.lay(Box::new(NullBackend::new(1)), "a").is_err(), "not together");
        assert!(limits.lay(Box::new(NullBackend::new(1)), "b").is_ok());
    }
}
