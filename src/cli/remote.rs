//! Remote sources: their addresses, and the options of the connections to them.

use std::fmt;
use std::time::Duration;

use bridge::backend::nbd::{NbdOptions, Reconnect};
use clap::{Args, ValueEnum};
use nbd_proto::uri::Uri;

use super::values;

/// Connections at most: a server lets in few from one client.
const MAX_CONNECTIONS: u16 = 64;

/// A remote export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteSource {
    /// Its address.
    pub(crate) uri: Uri,
    /// `?connections=N`.
    connections: Option<u16>,
}

impl fmt::Display for RemoteSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uri.fmt(f)
    }
}

/// Reads an NBD URI, with a parameter of our own among the others: `connections=N`.
pub(super) fn parse_remote(text: &str) -> Result<RemoteSource, String> {
    let (front, query) = text.split_once('?').unwrap_or((text, ""));
    let (mut connections, mut rest) = (None, Vec::new());
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let Some(number) = parameter.strip_prefix("connections=") else {
            rest.push(parameter);
            continue;
        };
        if connections.replace(parse_connections(number)?).is_some() {
            return Err("parameter \"connections\" is given twice".into());
        }
    }
    let query = if rest.is_empty() { String::new() } else { format!("?{}", rest.join("&")) };
    let uri = format!("{front}{query}").parse().map_err(|error| format!("{error}"))?;
    Ok(RemoteSource { uri, connections })
}

fn parse_connections(text: &str) -> Result<u16, String> {
    let number = text.parse().ok().filter(|n| (1..=MAX_CONNECTIONS).contains(n));
    number.ok_or_else(|| format!("connections: a number from 1 to {MAX_CONNECTIONS}"))
}

/// What is assumed of a server that comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReconnectMode {
    /// Its cache has survived: nothing that it answered is lost
    Trust,
    /// Only what is durable has: every change is made durable before it is answered
    Strict,
}

/// How remote exports are used: nothing here needs more than clap's checks.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Remote source (nbd://, nbd+unix://)")]
pub(crate) struct RemoteArgs {
    /// Connections to a server at most, where it allows several; each worker has its own then
    #[arg(long, value_name = "N", default_value = "16", value_parser = parse_connections)]
    connections: u16,

    /// Requests in flight on one connection to a server
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u32).range(1..=1024))]
    requests: u32,

    /// Time for one attempt to connect, with its handshake
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = values::parse_positive_duration)]
    connect_timeout: Duration,

    /// How long requests wait for a server that went away, before they fail; later ones try again
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = values::parse_duration)]
    reconnect_timeout: Duration,

    /// Give a connection up on which a request is not answered for so long, and connect again; 0 for never
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = values::parse_duration)]
    request_timeout: Duration,

    /// What is assumed of a server that comes back
    #[arg(long, value_name = "MODE", default_value = "trust")]
    reconnect: ReconnectMode,
}

impl RemoteArgs {
    /// The options for one source.
    pub(crate) fn options(&self, source: &RemoteSource) -> NbdOptions {
        NbdOptions {
            connections: source.connections.unwrap_or(self.connections),
            requests: self.requests,
            connect_timeout: self.connect_timeout,
            reconnect_timeout: self.reconnect_timeout,
            request_timeout: (!self.request_timeout.is_zero()).then_some(self.request_timeout),
            reconnect: match self.reconnect {
                ReconnectMode::Trust => Reconnect::Trust,
                ReconnectMode::Strict => Reconnect::Strict,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_stand_among_the_parameters() {
        let plain = parse_remote("nbd+unix:///a?socket=/x").unwrap();
        assert_eq!(plain.connections, None);
        for text in [
            "nbd+unix:///a?socket=/x&connections=3",
            "nbd+unix:///a?connections=3&socket=/x",
            "nbd+unix:///a?&connections=3&&socket=/x",
        ] {
            let source = parse_remote(text).unwrap();
            assert_eq!((source.connections, &source.uri), (Some(3), &plain.uri));
        }
        assert_eq!(parse_remote("nbd://h/?connections=64").unwrap().connections, Some(64));
        for text in [
            "nbd://h/?connections=0",
            "nbd://h/?connections=65",
            "nbd://h/?connections=",
            "nbd://h/?connections=1&connections=1",
            "nbd://h/?sockets=1",
            "nbd+unix:///?connections=1",
            "nbds://h/",
        ] {
            assert!(parse_remote(text).is_err(), "{text}");
        }
    }
}
