//! `kill -9` at each moment of what changes an image's tables: the disk kills the server when it makes the n-th change of a
//! commit, of the replay of a journal, or of a grow. What was answered is there afterwards.

use std::process::{Command, Stdio};

use nbd_proto::{Command as Nbd, ReplyStyle};
use rustix::process::Signal;

use super::disk::{Disk, Kind};
use super::model::Model;
use super::recorder::Recorder;
use super::support::{CONTROL_FOLDER, Client, NO_FLAGS, PROGRAM, Random, Server};
use super::{Limit, lacks};

/// What the kill comes amid.
#[derive(Clone, Copy, Debug)]
enum Amid {
    Commit,
    Replay,
    Grow,
}

/// A disk that can kill, and what it should hold.
struct World {
    recorder: Recorder,
    disk: Disk,
    model: Model,
    random: Random,
}

impl World {
    /// None where nothing can be mounted.
    fn new(kind: Kind, seed: u64) -> Option<World> {
        let made = tempfile::tempdir().unwrap();
        Disk::within(kind, made.path()).start().stop();
        let recorder = Recorder::new(made.path())?;
        let disk = Disk::at(kind, &recorder.folder());
        Some(World { recorder, disk, model: Model::default(), random: Random::new(seed) })
    }

    /// Serves the disk, which must hold all that was answered, and changes it without a flush at the end.
    fn serve(&mut self) -> (Server, Client) {
        let server = self.disk.start();
        let mut client = server.client(ReplyStyle::Structured);
        self.model.check(&mut client);
        for _ in 0..3 {
            self.model.load(&mut client, &mut self.random, |_| false);
        }
        self.model.allocate(&mut client, &mut self.random);
        (server, client)
    }

    /// Waits for the end of a server that was killed.
    fn bury(&mut self, mut server: Server) {
        server.child.wait().unwrap();
        assert!(self.recorder.thaw());
        self.model.lose_sight();
    }

    /// Has the server killed at the change after `events` others. False if it made fewer.
    fn kill_in_commit(&mut self, events: usize) -> bool {
        let (server, mut client) = self.serve();
        self.recorder.kill_after(events);
        client.ask(Nbd::Flush, NO_FLAGS, 0, 0);
        match client.answer_or_end() {
            Some(answer) => {
                assert_eq!(answer.error, None);
                assert!(!self.recorder.thaw());
                server.stop();
                false
            }
            None => {
                self.bury(server);
                true
            }
        }
    }

    fn kill_in_replay(&mut self, events: usize) -> bool {
        let (mut server, client) = self.serve();
        server.signal(Signal::KILL);
        server.child.wait().unwrap();
        drop(client);
        self.model.lose_sight();
        self.recorder.kill_after(events);
        match self.disk.try_start() {
            Ok(server) => {
                assert!(!self.recorder.thaw());
                server.stop();
                false
            }
            Err(log) => {
                assert!(self.recorder.thaw(), "{log}");
                true
            }
        }
    }

    fn kill_in_grow(&mut self, events: usize) -> bool {
        let (server, client) = self.serve();
        let before = client.size;
        self.recorder.kill_after(events);
        let mut command = Command::new(PROGRAM);
        command.args(["resize", &server.id().to_string(), "+1M"]).env(CONTROL_FOLDER, self.disk.control());
        let grown = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        if grown.success() {
            assert!(!self.recorder.thaw());
            server.stop();
            return false;
        }
        self.bury(server);
        let server = self.disk.start();
        let now = server.client(ReplyStyle::Structured).size;
        assert!(now == before || now == before + (1 << 20), "{before} bytes became {now}");
        server.stop();
        true
    }
}

/// Kills at the first changes one by one, at later ones more seldom, until one comes too late.
fn kill_at_each(amid: Amid, kind: Kind, seed: u64) {
    let limit = Limit::read(seed);
    let (mut rounds, mut kills) = (0, 0);
    while rounds == 0 || (limit.end.is_some() && limit.goes_on(rounds)) {
        let Some(mut world) = World::new(kind, limit.seed ^ rounds) else {
            eprintln!("SKIP: torture: a disk that kills needs root and /dev/fuse");
            return;
        };
        let (mut events, mut late) = (0, 0);
        // Once is no proof: a commit comes every five seconds, too.
        while late < 3 {
            let killed = match amid {
                Amid::Commit => world.kill_in_commit(events),
                Amid::Replay => world.kill_in_replay(events),
                Amid::Grow => world.kill_in_grow(events),
            };
            if killed {
                kills += 1;
                late = 0;
                events += 1 + events / 3 + world.random.index(1 + events / 4);
            } else {
                late += 1;
            }
        }
        assert!(events > 2, "{amid:?}: it is over after {events} changes");
        world.disk.finish(&mut world.model);
        rounds += 1;
    }
    println!("torture: kill in {amid:?} {}: {kills} kills, 0 losses", kind.name());
}

macro_rules! moments {
    ($($name:ident, $amid:expr, $kind:expr, $seed:literal;)*) => {$(
        #[test]
        fn $name() {
            if !lacks(stringify!($name), &["qemu-img"]) {
                kill_at_each($amid, $kind, $seed);
            }
        }
    )*};
}

moments! {
    kill_in_commit_64k, Amid::Commit, Kind::Qcow2("cluster_size=64k"), 0x70b1;
    kill_in_commit_512, Amid::Commit, Kind::Qcow2("cluster_size=512,refcount_bits=1"), 0x70b2;
    kill_in_commit_data_file, Amid::Commit, Kind::DataFile, 0x70b3;
    kill_in_replay_64k, Amid::Replay, Kind::Qcow2("cluster_size=64k"), 0x70b4;
    kill_in_replay_512, Amid::Replay, Kind::Qcow2("cluster_size=512,refcount_bits=1"), 0x70b5;
    kill_in_replay_backed, Amid::Replay, Kind::Backed, 0x70b6;
    kill_in_grow_64k, Amid::Grow, Kind::Qcow2("cluster_size=64k"), 0x70b7;
    kill_in_grow_512, Amid::Grow, Kind::Qcow2("cluster_size=512"), 0x70b8;
}
