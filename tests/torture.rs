//! Torture of a server: kill -9 under load and full disks, over every kind of disk. What was answered must be there after
//! each kill, what was refused must leave the rest alone, and the image must be in order in the end.
//!
//! Power cuts see what kills cannot: what a crash of the host loses. The disk below the image records what happens to it, and is
//! cut at any point afterwards.
//!
//! A part of it runs with the suite. `contrib/torture` runs it for minutes.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

#[path = "torture/disk.rs"]
mod disk;
#[path = "torture/model.rs"]
mod model;
#[path = "torture/moment.rs"]
mod moment;
#[path = "torture/power.rs"]
mod power;
#[path = "torture/recorder.rs"]
mod recorder;
mod support;

use std::time::{Duration, Instant};

use nbd_proto::{NbdError, ReplyStyle};
use rustix::process::Signal;

use disk::{Disk, Kind};
use model::Model;
use power::History;
use recorder::Recorder;
use support::{Random, eventually, lacks};

/// Rounds of a kind where no time is given.
const ROUNDS: u64 = 3;

/// Power cuts of one recording.
const CUTS: usize = 40;

/// How long a test goes on: so many rounds, or until its minutes are over.
struct Limit {
    seed: u64,
    end: Option<Instant>,
}

impl Limit {
    /// Reads NBDBRIDGE_TORTURE_MINUTES (of each test) and NBDBRIDGE_TORTURE_SEED.
    fn read(seed: u64) -> Limit {
        let variable = |name: &str| std::env::var(name).ok();
        let minutes = variable("NBDBRIDGE_TORTURE_MINUTES").map(|text| text.parse::<f64>().unwrap());
        let given = variable("NBDBRIDGE_TORTURE_SEED").map(|text| text.parse::<u64>().unwrap());
        Limit {
            seed: given.map_or(seed, |given| given ^ seed),
            end: minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(minutes * 60.0)),
        }
    }

    fn goes_on(&self, rounds: u64) -> bool {
        self.end.map_or(rounds < ROUNDS, |end| Instant::now() < end)
    }
}

/// Kills the server amid its load, again and again, and holds each successor against the model.
fn kill(kind: Kind, seed: u64) {
    let limit = Limit::read(seed);
    let mut random = Random::new(limit.seed);
    let mut disk = Disk::new(kind);
    let mut model = Model::default();
    let (mut rounds, mut requests) = (0, 0);
    while limit.goes_on(rounds) {
        if rounds > 0 && rounds.is_multiple_of(20) {
            // Allocation is what is dangerous: a new disk now and then, and the old one in order.
            disk.finish(&mut model);
            disk = Disk::new(kind);
            model = Model::default();
        }
        let mut server = disk.start();
        let mut client = server.client(ReplyStyle::Structured);
        model.check(&mut client);
        for _ in 0..1 + random.index(6) {
            requests += model.load(&mut client, &mut random, |_| false);
        }
        requests += model.begin(&mut client, &mut random);
        for _ in 0..random.index(12) {
            model.take(client.answer(), |_| false);
        }
        std::thread::sleep(Duration::from_micros(random.below(3000)));
        server.signal(Signal::KILL);
        server.child.wait().unwrap();
        while let Some(answer) = client.answer_or_end() {
            model.take(answer, |_| false);
        }
        model.lose_sight();
        rounds += 1;
    }
    disk.finish(&mut model);
    println!("torture: kill {}: {rounds} kills, {requests} requests, 0 losses", kind.name());
}

/// Fills the disk below the image, and makes room again, under load.
fn fill(kind: Kind, seed: u64) {
    let Some(full) = disk::Full::new() else {
        eprintln!("SKIP: torture: a full disk needs root, to mount a tmpfs");
        return;
    };
    let limit = Limit::read(seed);
    let mut random = Random::new(limit.seed);
    let (mut rounds, mut requests, mut refused) = (0, 0, 0);
    while limit.goes_on(rounds) {
        let mut disk = Disk::within(kind, &full.folder());
        let mut model = Model::default();
        let mut server = disk.start();
        let mut client = server.client(ReplyStyle::Structured);
        model.check(&mut client);
        full.fill(1 << 20);
        let mut count = |error| {
            refused += 1;
            error == NbdError::NoSpc
        };
        for _ in 0..12 {
            requests += model.load(&mut client, &mut random, &mut count);
        }
        model.check(&mut client);
        full.make_room();
        // One that fails for want of room fails for that time only.
        eventually("flushes succeed again", || {
            client.call(nbd_proto::Command::Flush, support::NO_FLAGS, 0, 0).error.is_none()
        });
        for _ in 0..3 {
            requests += model.load(&mut client, &mut random, |_| false);
        }
        model.check(&mut client);
        if random.below(2) == 0 {
            server.signal(Signal::KILL);
            server.child.wait().unwrap();
        } else {
            server.stop();
        }
        disk.finish(&mut model);
        rounds += 1;
    }
    println!(
        "torture: full {}: {rounds} fills, {requests} requests, {refused} refused, 0 losses",
        kind.name()
    );
}

/// Loads a disk that is recorded, and cuts its power at many points: what a flush or FUA made durable must be there.
fn power_cut(kind: Kind, seed: u64) {
    let limit = Limit::read(seed);
    let mut random = Random::new(limit.seed);
    let (mut rounds, mut cuts) = (0, 0);
    while rounds == 0 || (limit.end.is_some() && limit.goes_on(rounds)) {
        let made = tempfile::tempdir().unwrap();
        let mut history = History::new();
        Disk::within(kind, made.path()).start().stop();
        let Some(recorder) = Recorder::new(made.path()) else {
            eprintln!("SKIP: torture: a recorded disk needs root and /dev/fuse");
            return;
        };
        let disk = Disk::at(kind, &recorder.folder());
        let mut server = disk.start();
        let mut client = server.client(ReplyStyle::Structured);
        history.load(&mut client, &mut random, &recorder, 250);
        server.signal(Signal::KILL);
        server.child.wait().unwrap();
        let left = tempfile::tempdir().unwrap();
        for cut in 0..CUTS {
            let position = random.index(recorder.position() + 1);
            recorder.cut(position, &mut random, left.path());
            let allowed = history.allowed(position);
            let disk = Disk::at(kind, left.path());
            let bytes = if cut % 8 == 0 { disk.read_all() } else { disk.convert() };
            power::verify(&bytes, &allowed);
            cuts += 1;
        }
        rounds += 1;
    }
    println!("torture: power {}: {cuts} cuts, 0 losses", kind.name());
}

macro_rules! torture {
    ($how:ident: $($name:ident, $kind:expr, $seed:literal;)*) => {$(
        #[test]
        fn $name() {
            if !lacks(stringify!($name), &["qemu-img"]) {
                $how($kind, $seed);
            }
        }
    )*};
}

// Images of version 2 have no journal, and promise what was flushed: see the power cuts.
torture! { kill:
    kill_raw, Kind::Raw, 0x7081;
    kill_qcow2_512, Kind::Qcow2("cluster_size=512"), 0x7082;
    kill_qcow2_4k, Kind::Qcow2("cluster_size=4k"), 0x7083;
    kill_qcow2_64k, Kind::Qcow2("cluster_size=64k"), 0x7084;
    kill_qcow2_256k, Kind::Qcow2("cluster_size=256k"), 0x7085;
    kill_qcow2_2m, Kind::Qcow2("cluster_size=2M"), 0x7086;
    kill_qcow2_1_bit, Kind::Qcow2("cluster_size=4k,refcount_bits=1"), 0x7087;
    kill_qcow2_backed, Kind::Backed, 0x7089;
    kill_qcow2_data_file, Kind::DataFile, 0x708a;
    kill_overlay, Kind::Overlay, 0x708b;
    kill_proxy, Kind::Proxy, 0x708c;
}

torture! { power_cut:
    power_cut_raw, Kind::Raw, 0x70a1;
    power_cut_qcow2_512, Kind::Qcow2("cluster_size=512"), 0x70a2;
    power_cut_qcow2_4k, Kind::Qcow2("cluster_size=4k"), 0x70a3;
    power_cut_qcow2_64k, Kind::Qcow2("cluster_size=64k"), 0x70a4;
    power_cut_qcow2_2m, Kind::Qcow2("cluster_size=2M"), 0x70a5;
    power_cut_qcow2_1_bit, Kind::Qcow2("cluster_size=4k,refcount_bits=1"), 0x70a6;
    power_cut_qcow2_v2, Kind::Qcow2("compat=0.10,cluster_size=4k"), 0x70a7;
    power_cut_qcow2_backed, Kind::Backed, 0x70a8;
    power_cut_qcow2_data_file, Kind::DataFile, 0x70a9;
    power_cut_overlay, Kind::Overlay, 0x70aa;
}

torture! { fill:
    full_raw, Kind::Raw, 0x7091;
    full_qcow2_4k, Kind::Qcow2("cluster_size=4k"), 0x7092;
    full_qcow2_64k, Kind::Qcow2("cluster_size=64k"), 0x7093;
    full_overlay, Kind::Overlay, 0x7094;
}
