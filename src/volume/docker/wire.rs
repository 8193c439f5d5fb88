//! The protocol's messages: what Docker's documentation calls "Docker volume plugins", and podman speaks as well. Go
//! programs are at the other end: fields may be missing or null.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::volume::{Health, Name, Status};

/// The type of every answer's body.
pub(super) const MEDIA_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// `VolumeDriver.Create`.
#[derive(Debug, Deserialize)]
pub(super) struct Create {
    #[serde(rename = "Name")]
    pub(super) name: String,
    #[serde(rename = "Opts")]
    pub(super) options: Option<BTreeMap<String, String>>,
}

/// `VolumeDriver.Mount` and `VolumeDriver.Unmount`.
#[derive(Debug, Deserialize)]
pub(super) struct Mount {
    #[serde(rename = "Name")]
    pub(super) name: String,
    #[serde(rename = "ID", default)]
    pub(super) id: String,
}

/// `VolumeDriver.Get`, `Path` and `Remove`.
#[derive(Debug, Deserialize)]
pub(super) struct Which {
    #[serde(rename = "Name")]
    pub(super) name: String,
}

/// The answer to each of these; what is None is left out.
#[derive(Debug, Default, Serialize)]
pub(super) struct Answer {
    #[serde(rename = "Implements", skip_serializing_if = "Option::is_none")]
    pub(super) implements: Option<[&'static str; 1]>,
    #[serde(rename = "Capabilities", skip_serializing_if = "Option::is_none")]
    pub(super) capabilities: Option<Capabilities>,
    #[serde(rename = "Mountpoint", skip_serializing_if = "Option::is_none")]
    pub(super) mountpoint: Option<String>,
    #[serde(rename = "Volume", skip_serializing_if = "Option::is_none")]
    pub(super) volume: Option<Volume>,
    #[serde(rename = "Volumes", skip_serializing_if = "Option::is_none")]
    pub(super) volumes: Option<Vec<Volume>>,
    /// One line; empty for a success.
    #[serde(rename = "Err")]
    pub(super) error: String,
}

/// Volumes belong to this host.
#[derive(Debug, Serialize)]
pub(super) struct Capabilities {
    #[serde(rename = "Scope")]
    pub(super) scope: &'static str,
}

/// One volume.
#[derive(Debug, Serialize)]
pub(super) struct Volume {
    #[serde(rename = "Name")]
    name: String,
    /// Empty while it is not mounted.
    #[serde(rename = "Mountpoint")]
    mountpoint: String,
    #[serde(rename = "CreatedAt", skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    #[serde(rename = "Status", skip_serializing_if = "Option::is_none")]
    status: Option<Value>,
}

impl Volume {
    /// In a list; `created` is in seconds since 1970.
    pub(super) fn listed(name: &Name, mountpoint: String, created: Option<u64>) -> Self {
        Volume { name: name.to_string(), mountpoint, created: created.map(timestamp), status: None }
    }

    /// With all that is known of it.
    pub(super) fn inspected(status: &Status) -> Self {
        let mountpoint = status.mounted.as_ref().map(|path| path.display().to_string());
        let health = match &status.health {
            Health::Ok => "ok",
            Health::Bad(why) => why,
        };
        let filesystem = json!({ "type": status.fs, "usage": status.usage });
        let references: u64 = status.holders.values().map(|count| u64::from(*count)).sum();
        let known = json!({
            "size": status.size,
            "allocated": status.allocated,
            "filesystem": filesystem,
            "door": status.door,
            "guarantee": status.guarantee,
            "loss_after_crash": status.loss_after_crash,
            "device": status.device,
            "references": references,
            "holders": status.holders,
            "limits": status.limits,
            "parent": status.parent,
            "options": status.options,
            "health": health,
        });
        Volume {
            status: Some(known),
            ..Volume::listed(&status.name, mountpoint.unwrap_or_default(), Some(status.created))
        }
    }

    /// One that is damaged.
    pub(super) fn broken(name: &Name, why: &str) -> Self {
        Volume { status: Some(json!({ "health": why })), ..Volume::listed(name, String::new(), None) }
    }
}

/// Seconds since 1970 as RFC 3339 has them, in UTC.
fn timestamp(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years of 400 come round; they begin in March, so that the leap day is their last.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3_600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_may_be_null_or_absent() {
        for text in [r#"{"Name":"a"}"#, r#"{"Name":"a","Opts":null}"#, r#"{"Name":"a","More":[]}"#] {
            let create: Create = serde_json::from_str(text).unwrap();
            assert_eq!((create.name.as_str(), create.options), ("a", None));
        }
        let create: Create = serde_json::from_str(r#"{"Name":"a","Opts":{"size":"1G"}}"#).unwrap();
        assert_eq!(create.options.unwrap()["size"], "1G");
        let mount: Mount = serde_json::from_str(r#"{"Name":"a"}"#).unwrap();
        assert_eq!((mount.name.as_str(), mount.id.as_str()), ("a", ""));
        assert!(serde_json::from_str::<Which>("{}").is_err());
    }

    #[test]
    fn answers_have_what_they_are_asked_for() {
        let text = |answer: &Answer| serde_json::to_string(answer).unwrap();
        assert_eq!(text(&Answer::default()), r#"{"Err":""}"#);
        let mounted = Answer { mountpoint: Some("/m".into()), ..Answer::default() };
        assert_eq!(text(&mounted), r#"{"Mountpoint":"/m","Err":""}"#);
        let name = "a".parse().unwrap();
        let volume = Volume::listed(&name, String::new(), Some(0));
        let listed = Answer { volumes: Some(vec![volume]), ..Answer::default() };
        let expected =
            r#"{"Volumes":[{"Name":"a","Mountpoint":"","CreatedAt":"1970-01-01T00:00:00Z"}],"Err":""}"#;
        assert_eq!(text(&listed), expected);
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_764_042_302, "2025-11-25T03:45:02Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(timestamp(seconds), text);
        }
    }
}
