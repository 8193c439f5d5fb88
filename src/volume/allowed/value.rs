//! Values of options: what one may be, and how that is shown to a person.

/// An option and the values that it takes. Of a mkfs program the name has its dashes.
pub(super) type Known = (&'static str, Value);

/// The values of an option.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    /// The option stands alone.
    Nothing,
    /// Decimal digits, at most [`MAX_DIGITS`].
    Number,
    /// Decimal digits, and perhaps a fraction.
    Fraction,
    /// A number with a unit, as in `64k`.
    Size,
    OneOf(&'static [&'static str]),
    /// One of these, and perhaps a level behind it, as in `zstd:3`.
    Level(&'static [&'static str]),
    /// A list of these, separated by commas; `^` before one turns it off.
    Features(&'static [&'static str]),
    /// A name without blanks, slashes, commas and the like; of no file.
    Label,
    /// A UUID, or one of the words.
    Uuid(&'static [&'static str]),
    /// A list of options with values of their own, separated by commas.
    Keys(&'static [Known]),
    /// Another value, or nothing.
    Optional(&'static Value),
}

/// Enough for every number that means something.
const MAX_DIGITS: usize = 12;

/// The longest label of these file systems, in bytes: btrfs's.
const MAX_LABEL: usize = 255;

/// Splits `NAME=VALUE`.
pub(super) fn split(option: &str) -> (&str, Option<&str>) {
    option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)))
}

/// An option for a person, as in `commit=N`; a mkfs program's value comes after a blank.
pub(super) fn show((name, value): &Known, between: &str) -> String {
    match value {
        Value::Nothing => (*name).to_owned(),
        Value::Optional(value) => format!("{name}[{between}{}]", value.shown()),
        value => format!("{name}{between}{}", value.shown()),
    }
}

impl Value {
    /// Returns true if the option may have this value; None stands for an option without one.
    pub(super) fn accepts(self, value: Option<&str>) -> bool {
        match (self, value) {
            (Value::Nothing | Value::Optional(_), None) => true,
            (Value::Nothing, Some(_)) | (_, None) => false,
            (Value::Optional(wanted), value) => wanted.accepts(value),
            (wanted, Some(value)) => wanted.accepts_text(value),
        }
    }

    fn accepts_text(self, text: &str) -> bool {
        match self {
            Value::Nothing => false,
            Value::Number => is_number(text),
            Value::Fraction => match text.split_once('.') {
                Some((whole, rest)) => is_number(whole) && is_number(rest),
                None => is_number(text),
            },
            Value::Size => is_number(text.strip_suffix(is_unit).unwrap_or(text)),
            Value::OneOf(words) => words.contains(&text),
            Value::Level(words) => match text.split_once(':') {
                Some((word, level)) => words.contains(&word) && is_number(level),
                None => words.contains(&text),
            },
            Value::Features(words) => {
                text.split(',').all(|word| words.contains(&word.strip_prefix('^').unwrap_or(word)))
            }
            Value::Label => is_label(text),
            Value::Uuid(words) => words.contains(&text) || is_uuid(text),
            Value::Keys(keys) => text.split(',').all(|part| {
                let (name, value) = split(part);
                keys.iter().any(|(key, wanted)| *key == name && wanted.accepts(value))
            }),
            Value::Optional(value) => value.accepts_text(text),
        }
    }

    fn shown(self) -> String {
        match self {
            Value::Nothing => String::new(),
            Value::Number | Value::Fraction => "N".to_owned(),
            Value::Size => "SIZE".to_owned(),
            Value::OneOf(words) => words.join("|"),
            Value::Level(words) => format!("{}[:N]", words.join("|")),
            Value::Features(words) => format!("[^]{}", words.join(",[^]")),
            Value::Label => "NAME".to_owned(),
            Value::Uuid(words) => [&["UUID"], words].concat().join("|"),
            Value::Keys(keys) => keys.iter().map(|key| show(key, "=")).collect::<Vec<_>>().join(","),
            Value::Optional(value) => format!("[{}]", value.shown()),
        }
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_DIGITS && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_unit(c: char) -> bool {
    matches!(c.to_ascii_lowercase(), 'k' | 'm' | 'g' | 't' | 's' | 'b')
}

fn is_label(text: &str) -> bool {
    let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let rest =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-' | b'+' | b':' | b'@');
    first && text.len() <= MAX_LABEL && text.bytes().all(rest)
}

fn is_uuid(text: &str) -> bool {
    let lengths: Vec<_> = text.split('-').map(str::len).collect();
    lengths == [8, 4, 4, 4, 12] && text.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_what_they_say() {
        const KEYS: Value = Value::Keys(&[("size", Value::Size), ("lazy", Value::Nothing)]);
        for (value, good, bad) in [
            (Value::Number, ["0", "123456789012"], ["", "1234567890123"]),
            (Value::Number, ["7", "00"], ["-1", "0x7"]),
            (Value::Fraction, ["5", "0.5"], [".", "1.2.3"]),
            (Value::Size, ["4096", "64K"], ["K", "64KB"]),
            (Value::OneOf(&["a", "b"]), ["a", "b"], ["", "a,b"]),
            (Value::Level(&["a", "b"]), ["a", "b:3"], ["a:", "c:3"]),
            (Value::Features(&["a", "b"]), ["^a,b", "b"], ["^^a", "a,"]),
            (Value::Label, ["UUID", "a.b-c"], ["a/b", "-a"]),
            (Value::Label, ["x", "_"], ["a=b", "ä"]),
            (
                Value::Uuid(&["random"]),
                ["random", "0c1c6a9c-8bd5-4b06-a1ac-8c1ec5fd6a3c"],
                ["clear", "0c1c-8bd5"],
            ),
            (KEYS, ["size=1m,lazy", "lazy"], ["lazy=1", "size"]),
            (Value::Optional(&Value::Number), ["1", "2"], ["", "x"]),
        ] {
            for text in good {
                assert!(value.accepts(Some(text)), "{value:?}: {text}");
            }
            for text in bad {
                assert!(!value.accepts(Some(text)), "{value:?}: {text}");
            }
        }
        assert!(Value::Nothing.accepts(None) && !Value::Number.accepts(None));
        assert!(Value::Optional(&Value::Number).accepts(None));
        assert_eq!(show(&("commit", Value::Number), "="), "commit=N");
        assert_eq!(show(&("-J", KEYS), " "), "-J size=SIZE,lazy");
        assert_eq!(
            show(&("discard", Value::Optional(&Value::OneOf(&["sync", "async"]))), "="),
            "discard[=sync|async]"
        );
    }
}
