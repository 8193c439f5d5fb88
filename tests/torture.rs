//! Torture of a server: kill -9 under load and full disks, over every kind of disk. What was answered must be there after
//! each kill, what was refused must leave the rest alone, and the image must be in order in the end.
//!
//! A part of it runs with the suite. `contrib/torture` runs it for minutes, together with the power cuts of crate
//! `bridge`, which see what these kills cannot: what a crash of the host loses.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

#[path = "torture/disk.rs"]
mod disk;
#[path = "torture/model.rs"]
mod model;
mod support;

use std::time::{Duration, Instant};

use nbd_proto::{NbdError, ReplyStyle};
use rustix::process::Signal;

use disk::{Disk, Kind};
use model::Model;
use support::{Random, eventually, lacks};

/// Rounds of a kind where no time is given.
const ROUNDS: u64 = 3;

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

torture! { kill:
    kill_raw, Kind::Raw, 0x7081;
    kill_qcow2_512, Kind::Qcow2("cluster_size=512"), 0x7082;
    kill_qcow2_4k, Kind::Qcow2("cluster_size=4k"), 0x7083;
    kill_qcow2_64k, Kind::Qcow2("cluster_size=64k"), 0x7084;
    kill_qcow2_256k, Kind::Qcow2("cluster_size=256k"), 0x7085;
    kill_qcow2_2m, Kind::Qcow2("cluster_size=2M"), 0x7086;
    kill_qcow2_1_bit, Kind::Qcow2("cluster_size=4k,refcount_bits=1"), 0x7087;
    kill_qcow2_v2, Kind::Qcow2("compat=0.10,cluster_size=64k"), 0x7088;
    kill_qcow2_backed, Kind::Backed, 0x7089;
    kill_qcow2_data_file, Kind::DataFile, 0x708a;
    kill_overlay, Kind::Overlay, 0x708b;
    kill_proxy, Kind::Proxy, 0x708c;
}

torture! { fill:
    full_raw, Kind::Raw, 0x7091;
    full_qcow2_4k, Kind::Qcow2("cluster_size=4k"), 0x7092;
    full_qcow2_64k, Kind::Qcow2("cluster_size=64k"), 0x7093;
    full_overlay, Kind::Overlay, 0x7094;
}
