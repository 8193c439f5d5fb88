//! Container volumes with the engines that use them: Debian's podman and dockerd, unpacked by tests/engines/prepare, and the
//! plugin's protocol by raw HTTP. Each test has a world of its own (tests/engines/world), which ends with it. Needs root and
//! /dev/fuse; without the engines' packages (no Debian, no network at the first run) it is skipped.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

#[macro_use]
#[path = "containers/world.rs"]
mod world;

#[path = "containers/crash.rs"]
mod crash;
#[path = "containers/docker.rs"]
mod docker;
#[path = "containers/http.rs"]
mod http;
#[path = "containers/managed.rs"]
mod managed;
#[path = "containers/plugin.rs"]
mod plugin;
#[path = "containers/podman.rs"]
mod podman;
#[path = "containers/storm.rs"]
mod storm;
