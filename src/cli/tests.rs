//! Command lines to values. What a person sees on the terminal is tested on the program itself (tests/cli.rs).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use super::values::{self, AioMode, CacheMode, DetectZeroes, DiscardMode, Host, Listen, Source};
use super::*;
use crate::size::NewSize;

fn serve(line: &str) -> ServeArgs {
    match words(line.split_whitespace().map(OsString::from)) {
        Ok(Action::Serve(args)) => *args,
        other => panic!("{line}: {other:?}"),
    }
}

fn net(line: &str) -> NetArgs {
    let [DoorArgs::Net(net)] = <[DoorArgs; 1]>::try_from(serve(line).doors).expect(line) else {
        panic!("{line}")
    };
    net
}

fn refused(line: &str) {
    assert!(words(line.split_whitespace().map(OsString::from)).is_err(), "{line}");
}

fn words(words: impl Iterator<Item = OsString>) -> Result<Action, ExitCode> {
    parse(["nbdbridge".into(), "net".into()].into_iter().chain(words))
}

fn local(port: u16) -> Listen {
    Listen::Tcp { host: Host::Address([127, 0, 0, 1].into()), port }
}

fn path(text: &str) -> Source {
    Source::Path(PathBuf::from(text))
}

#[test]
fn clap_finds_no_fault_with_the_flags() {
    command().debug_assert();
}

#[test]
fn one_word_is_enough() {
    let (args, net) = (serve("disk.img"), net("disk.img"));
    assert_eq!(
        args.exports,
        [ExportArg {
            name: String::new(),
            description: None,
            source: path("disk.img"),
            options: Default::default()
        }]
    );
    assert!(net.listen.is_empty());
    assert_eq!(net.listen_or_default(), [local(10809)]);
    assert_eq!(net.handshake_limit, Some(Duration::from_secs(10)));
    assert_eq!(net.send_timeout, Duration::from_secs(30));
    assert_eq!(args.process.drain_timeout, Duration::from_secs(10));
    assert_eq!(
        (args.source.cache, args.source.aio, args.source.discard),
        (CacheMode::Writeback, AioMode::Auto, DiscardMode::Unmap)
    );
    assert_eq!((args.source.part, args.source.create, &args.source.overlay), (None, None, &None));
    assert!(args.source.throttles.is_empty() && args.source.detect_zeroes == DetectZeroes::Off);
    assert_eq!((net.max_in_flight, net.memory_budget), (128, 256 << 20));
    assert!(args.process.workers >= 1 && net.shared.is_none() && args.source.lock);
    assert!(!args.source.read_only && !net.once && !args.process.fork && args.process.pid_file.is_none());
}

#[test]
fn the_letters_of_qemu_nbd() {
    let line = "-b ::1 -p 0 -k /run/x.sock -x name -D words -e 5 -f raw -r -o 1M -t --fork --pid-file x.pid \
                --handshake-limit 0 -n --aio native --discard off --detect-zeroes=off -vv disk.img";
    let (args, net) = (serve(line), net(line));
    let tcp = Listen::Tcp { host: Host::Address("::1".parse().unwrap()), port: 0 };
    assert_eq!(net.listen, [Listen::Unix("/run/x.sock".into()), tcp]);
    assert_eq!(args.exports[0].name, "name");
    assert_eq!(args.exports[0].description.as_deref(), Some("words"));
    assert_eq!(net.shared.map(u32::from), Some(5));
    assert_eq!(args.source.part, Some(Part::Range { offset: 1 << 20, size: None }));
    assert_eq!(args.process.verbose, 2);
    assert!(args.source.read_only && args.process.fork && !net.once);
    assert_eq!(net.handshake_limit, None);
    assert_eq!(
        (args.source.cache, args.source.aio, args.source.discard),
        (CacheMode::None, AioMode::IoUring, DiscardMode::Ignore)
    );
}

#[test]
fn the_flags_of_our_own() {
    let line = "mem:1M --once --workers 3 --max-in-flight 7 --memory-budget 1G --send-timeout 500ms \
         --drain-timeout 0 --no-lock --cache unsafe --aio threads --discard on --throttle iops-total=1,bps-read=2 \
         --throttle iops-size=4k";
    let (args, net) = (serve(line), net(line));
    assert!(net.once && !args.source.lock);
    assert_eq!((args.process.workers, net.max_in_flight, net.memory_budget), (3, 7, 1 << 30));
    assert_eq!((net.send_timeout, args.process.drain_timeout), (Duration::from_millis(500), Duration::ZERO));
    assert_eq!(
        (args.source.cache, args.source.aio, args.source.discard),
        (CacheMode::Unsafe, AioMode::Threads, DiscardMode::Unmap)
    );
    assert_eq!(args.source.throttles, ["iops-total=1,bps-read=2", "iops-size=4k"]);
}

#[test]
fn layers() {
    let args = serve("a -s -P 5 --detect-zeroes unmap -A").source;
    assert_eq!((args.overlay, args.part), (Some(OverlayArg::Temporary), Some(Part::Partition(5))));
    assert_eq!(args.detect_zeroes, DetectZeroes::Unmap);
    assert!(net("a -A").allocation_depth && !net("a").allocation_depth);
    let args = serve("a --overlay b --size 1K --detect-zeroes on -r").source;
    assert_eq!(args.overlay, Some(OverlayArg::Keep("b".into())));
    assert_eq!(args.part, Some(Part::Range { offset: 0, size: Some(1024) }));
    for line in [
        "a -s --overlay b",
        "a -s -r",
        "a -s --create 1M",
        "a --overlay b --create 1M",
        "--export a=b --export c=d --overlay e",
        "a -P 0",
        "a -P 1 -o 1",
        "a -P 1 --size 1",
        "a --detect-zeroes unmap --discard ignore",
    ] {
        refused(line);
    }
}

#[test]
fn where_to_listen() {
    let tcp = |name: &str, port| Listen::Tcp { host: Host::Name(name.into()), port };
    assert_eq!(net("x -k s").listen, [Listen::Unix("s".into())]);
    assert_eq!(net("x -p 1").listen, [local(1)]);
    assert_eq!(net("x -b localhost").listen, [tcp("localhost", 10809)]);
    assert_eq!(net("x -b [::]").listen_or_default()[0].to_string(), "[::]:10809");
    assert_eq!(net("x -b localhost -b h -p 1").listen, [tcp("localhost", 1), tcp("h", 1)]);
    for text in ["fe80::1%eth0", "[fe80::1%eth0]"] {
        let scoped = net(&format!("x -b {text}")).listen;
        assert_eq!(
            (&scoped[..], scoped[0].to_string()),
            (&[tcp("fe80::1%eth0", 10809)][..], "[fe80::1%eth0]:10809".to_owned())
        );
    }
    let named = net("x -k @disk").listen;
    assert_eq!(
        (&named[..], named[0].to_string()),
        (&[Listen::Unix("\0disk".into())][..], "@disk".to_owned())
    );
    assert!(
        Host::Name("localhost".into()).resolve(7).unwrap().iter().all(|address| address.ip().is_loopback())
    );
    for line in [
        "x -b 1.2.3.4:5",
        "x -b *",
        "x -b a/b",
        "x -b fe80::1%",
        "x -b h%eth0",
        "x -k @",
        "x -p 65536",
        "x -p http",
    ] {
        refused(line);
    }
    refused(&format!("x -k {}", "a".repeat(108)));
}

#[test]
fn what_to_serve() {
    let args = serve("--export a=one.img --export b=mem:1K --export c==d=e --create 1M");
    let shown: Vec<_> = args.exports.iter().map(|e| (e.name.as_str(), e.source.clone())).collect();
    assert_eq!(shown, [("a", path("one.img")), ("b", Source::Memory(1024)), ("c", path("=d=e"))]);
    assert_eq!(args.source.create, Some(1 << 20));
    let args = serve(
        "--export a=x,y,read-only --export b=mem:1M,snapshot --export c=i,format=qcow2,snapshot -f raw",
    );
    let own: Vec<_> = args.exports.iter().map(|export| export.settings(&args.source)).collect();
    let own: Vec<_> = own.iter().map(|s| (s.read_only, s.overlay.is_some(), s.format)).collect();
    assert_eq!(
        own,
        [
            (true, false, Some(Format::Raw)),
            (false, true, Some(Format::Raw)),
            (false, true, Some(Format::Qcow2))
        ]
    );
    assert_eq!((args.exports[0].source.clone(), args.exports[2].source.clone()), (path("x,y"), path("i")));
    let args = serve("first.img -x one --export =second.img");
    assert_eq!((args.exports[0].name.as_str(), args.exports[1].name.as_str()), ("one", ""));
    for line in [
        "",
        "-x name --export a=b",
        "x --export =y",
        "--export a=x,read-only,snapshot",
        "--export a=x,format=odd",
        "-r --export a=x,snapshot",
        "--export a=b --export a=c",
        "mem:1M --create 1M",
        "x -t --once",
        "x -n --cache none",
        "x --memory-budget 127M",
        "x --send-timeout 0",
        "x --workers 0",
        "x --max-in-flight 0",
        "x y",
    ] {
        refused(line);
    }
}

#[test]
fn sources() {
    let parse = |text: &str| values::parse_source(text.into());
    assert_eq!(parse("mem:1M"), Ok(Source::Memory(1 << 20)));
    assert_eq!(parse("null:7E"), Ok(Source::Null(7 << 60)));
    assert_eq!(parse("null-co://"), Ok(Source::Null(1 << 30)));
    assert_eq!(parse("null-co://,size=64Mi"), Ok(Source::Null(64 << 20)));
    assert_eq!(parse("null-aio://1T"), Ok(Source::Null(1 << 40)));
    assert_eq!(parse("nbd:h:1:exportname=e").unwrap().to_string(), "nbd://h:1/e");
    assert_eq!(parse("nbd:unix:s").unwrap().to_string(), "nbd+unix:///?socket=s");
    assert_eq!(parse("file:mem:1"), Ok(path("mem:1")));
    assert_eq!(parse("./mem:x"), Ok(path("./mem:x")));
    assert_eq!(parse("file:///srv/disk.img"), Ok(path("///srv/disk.img")));
    assert_eq!(
        parse("a://b"),
        Err("of URLs only nbd:// and nbd+unix:// are sources; give one, a path, mem:SIZE or null:SIZE".into())
    );
    let remote = parse("nbd+unix:///x?socket=y").unwrap();
    assert!(matches!(&remote, Source::Remote(_)) && remote.to_string() == "nbd+unix:///x?socket=y");
    assert_eq!(parse("nbd:x"), Ok(path("nbd:x")));
    assert_eq!(parse("a b://c"), Ok(path("a b://c")));
    for text in
        ["", "file:", "mem:", "mem:x", "null:-1", "mem:8E", "nbds://h/x", "nbd+unix:///x", "nbd+ssh://h/x"]
    {
        assert!(parse(text).is_err(), "{text}");
    }
    let odd = OsString::from_vec(vec![b'd', 0xff]);
    assert_eq!(values::parse_source(odd.clone()), Ok(Source::Path(odd.into())));
    let odd_name = OsString::from_vec(vec![0xff, b'=', b'x']);
    assert!(values::parse_export(odd_name).is_err());
    assert!(values::parse_string("x".repeat(4096).into()).is_ok());
    assert!(values::parse_string("x".repeat(4097).into()).is_err());
}

#[test]
fn times() {
    for (text, milliseconds) in
        [("0", 0), ("10", 10_000), ("10s", 10_000), ("500ms", 500), ("1.5", 1500), ("2m", 120_000)]
    {
        assert_eq!(values::parse_duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
    }
    for text in ["", "x", "-1", "1h2", "s", ".", "1e9", "99999999999999999999", "inf", "NaN"] {
        assert!(values::parse_duration(text).is_err(), "{text}");
    }
}

fn fuse(line: &str) -> Result<ServeArgs, ExitCode> {
    let words = ["nbdbridge", "fuse"].into_iter().chain(line.split_whitespace()).map(OsString::from);
    match parse(words)? {
        Action::Serve(args) => Ok(*args),
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn a_second_door_has_all_flags_of_the_server() {
    let args = fuse("disk.img file").unwrap();
    assert!(matches!(args.doors[..], [DoorArgs::Fuse(_)]) && !args.multi_writer);
    let args = fuse("disk.img file --also-net -k s -x name -D words -e 3 --max-in-flight 5").unwrap();
    let [DoorArgs::Fuse(_), DoorArgs::Net(net)] = &args.doors[..] else { panic!("{:?}", args.doors) };
    assert_eq!(net.listen, [Listen::Unix("s".into())]);
    assert_eq!((net.shared.map(u32::from), net.max_in_flight), (Some(3), 5));
    assert_eq!(
        (args.exports[0].name.as_str(), args.exports[0].description.as_deref()),
        ("name", Some("words"))
    );
    let args = fuse("disk.img file --also-net --multi-writer").unwrap();
    let net = args.doors[1].net().unwrap();
    assert!(args.multi_writer && net.listen_or_default() == [local(10809)]);
    // None of them means anything without it.
    for flags in ["-k s", "-p 1", "-b ::1", "-x name", "-e 1", "--memory-budget 1G", "--send-timeout 5", "-t"]
    {
        assert!(fuse(&format!("disk.img file {flags}")).is_err(), "{flags}");
        assert!(fuse(&format!("disk.img file {flags} --also-net")).is_ok(), "{flags}");
    }
    assert!(fuse("disk.img file --also-net --once").is_err());
    assert_eq!(serve("disk.img --also-fuse f").doors.len(), 2);
}

fn ask(line: &str) -> Option<AskAction> {
    let words = std::iter::once("nbdbridge").chain(line.split_whitespace()).map(OsString::from);
    match parse(words) {
        Ok(Action::Ask(action)) => Some(action),
        _ => None,
    }
}

#[test]
fn what_running_servers_are_asked() {
    assert_eq!(ask("ps"), Some(AskAction::Ps { json: false }));
    assert_eq!(ask("stats --json"), Some(AskAction::Stats { export: None, json: true }));
    assert_eq!(ask("stats a"), Some(AskAction::Stats { export: Some("a".into()), json: false }));
    let throttle = |wish| Some(AskAction::Throttle { export: "a".into(), group: None, wish, json: false });
    assert_eq!(ask("throttle a"), throttle(LimitsWish::Show));
    assert_eq!(ask("throttle a off"), throttle(LimitsWish::Off));
    let pairs = [("iops-total", "5"), ("bps-read", "1M"), ("x", "y=z")];
    let pairs = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    assert_eq!(ask("throttle a iops-total=5,bps-read=1M x=y=z"), throttle(LimitsWish::Change(pairs)));
    let mut of_group = throttle(LimitsWish::Off);
    if let Some(AskAction::Throttle { group, .. }) = &mut of_group {
        *group = Some("g".to_owned());
    }
    assert_eq!(ask("throttle a group=g off"), of_group);
    let resize = AskAction::Resize { export: "1:".into(), size: NewSize::Exactly(3 << 20), json: true };
    assert_eq!(ask("resize 1: 3M --json"), Some(resize));
    let more = AskAction::Resize { export: "1:".into(), size: NewSize::More(10 << 20), json: false };
    assert_eq!(ask("resize 1: +10Mi"), Some(more));
    for line in [
        "ps x",
        "stats a b",
        "throttle",
        "throttle a b",
        "throttle a group=g",
        "throttle a group=g,group=h,off",
        "throttle a off x=1",
        "resize a",
        "resize a x",
    ] {
        assert_eq!(ask(line), None, "{line}");
    }
}

fn ublk(line: &str) -> Result<(ServeArgs, UblkArgs), ExitCode> {
    let words = ["nbdbridge", "ublk"].into_iter().chain(line.split_whitespace()).map(OsString::from);
    let Action::Ublk(mut args) = parse(words)? else { panic!("{line}") };
    let Some(DoorArgs::Ublk(ublk)) = args.doors.pop() else { panic!("{line}") };
    Ok((*args, ublk))
}

#[test]
fn a_device_is_made_of_one_word() {
    let (args, device) = ublk("disk.img").unwrap();
    assert_eq!(args.exports[0].source, path("disk.img"));
    assert_eq!((device.source.to_string().as_str(), device.words.len()), ("disk.img", 1));
    assert_eq!((device.id, device.depth, device.io_size, device.block_size), (None, 128, 512 << 10, None));
    assert!((1..=4).contains(&device.queues));
    assert!(device.recoverable && !device.supervise && device.recover.is_none());
    assert_eq!(device.recover_timeout, Duration::from_secs(60));
    assert_eq!(device.io_timeout, Some(Duration::from_secs(300)));
    assert_eq!(ublk("x --io-timeout 0").unwrap().1.io_timeout, None);
}

#[test]
fn what_can_be_taken_over_and_who_watches() {
    let of = |line: &str| ublk(line).map(|(_, device)| (device.recoverable, device.supervise));
    let table = [
        ("x", Some((true, false))),
        ("x --recoverable=off", Some((false, false))),
        ("x --recoverable", Some((true, false))),
        ("x --fork", Some((true, true))),
        ("x --fork --no-supervise", Some((true, false))),
        ("x --supervise", Some((true, true))),
        ("x --no-lock", Some((false, false))),
        ("mem:1M", Some((false, false))),
        ("x --unprivileged", Some((false, false))),
        ("x --no-lock --recoverable", None),
        ("mem:1M --recoverable", None),
        ("x --unprivileged --recoverable", None),
        ("x --supervise --recoverable=off", None),
        ("x --recover 3", None),
        ("", None),
        ("x --io-size 1000", None),
        ("x --io-size 64M", None),
        ("x --block-size 1024", None),
        ("x --depth 0", None),
        ("x --recoverable=maybe", None),
    ];
    for (line, expected) in table {
        assert_eq!(of(line).ok(), expected, "{line}");
    }
}

#[test]
fn partitions_are_scanned_as_asked() {
    let of = |line: &str| ublk(line).ok().map(|(_, device)| device.scan_partitions);
    assert_eq!(of("x"), Some(None));
    assert_eq!(of("x --scan-partitions"), Some(Some(true)));
    assert_eq!(of("x --scan-partitions=off"), Some(Some(false)));
    assert_eq!(of("x --scan-partitions=perhaps"), None);
}

#[test]
fn a_device_that_is_taken_over_keeps_its_own_options() {
    let words = ["nbdbridge", "ublk", "--recover", "3", "--supervise", "--pid-file", "p"].map(OsString::from);
    let Ok(Action::Recover(recover)) = parse(words) else { panic!() };
    let (mut args, device) = ublk("disk.img --read-only --fork --depth 9").unwrap();
    args.doors.push(DoorArgs::Ublk(device));
    recover.apply(&mut args);
    let device = args.doors[0].ublk().unwrap();
    assert_eq!((device.recover, device.depth, device.supervise), (Some(3), 9, true));
    assert!(args.source.read_only && !args.process.fork && args.process.pid_file.is_some());
}

#[test]
fn a_file_and_a_block_device() {
    let args = fuse("disk.img /mnt/disk --allow-other --growable --threads 3 -r --fork").unwrap();
    assert!(args.source.read_only && args.process.fork);
    let [DoorArgs::Fuse(file)] = &args.doors[..] else { panic!("{args:?}") };
    assert_eq!(file.file, std::path::Path::new("/mnt/disk"));
    assert!(file.allow_other && file.growable && file.threads == Some(3));
    assert!(args.doors[0].is_local() && args.doors[0].net().is_none());
    // A block device is served in the background by default.
    for (more, fork) in [(&[][..], true), (&["--foreground"], false)] {
        let words = ["nbdbridge", "attach", "disk.img"].iter().chain(more).map(OsString::from);
        let Ok(Action::Attach(action)) = parse(words) else { panic!("{more:?}") };
        assert!(
            action.by_loop.process.fork == fork && matches!(action.by_loop.doors[..], [DoorArgs::Loop(_)])
        );
        let Ok(Action::Ublk(args)) = parse(action.ublk_words) else { panic!("{more:?}") };
        assert!(args.process.fork == fork && matches!(&args.doors[..], [DoorArgs::Ublk(_)]));
    }
}
