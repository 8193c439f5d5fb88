//! What goes on at once, on how many connections, and what cannot be used at all.

use super::*;

#[test]
fn what_is_dropped_in_flight_leaves_the_stream_whole() {
    let server = Server::new(Offer::new(8 << 20, EXTENDED));
    let seed = support::seed();
    run(async {
        let disk = server.open(&options());
        let mut random = bridge::random::Random::new(seed);
        for round in 0..300_u64 {
            let len = usize::try_from(1 + random.below(300_000)).unwrap();
            let offset = random.below((8 << 20) - len as u64);
            let mut dropped = if round % 2 == 0 {
                disk.write(offset, Buffer::copy_of(&vec![0; len]), Flags::NONE)
            } else {
                Box::pin(async { disk.read(offset, Buffer::new(len), Flags::NONE).await.map(drop) })
            };
            // Not begun, queued, in part on the wire, or on its way back.
            for _ in 0..random.below(4) {
                let _ = poll_fn(|cx| Poll::Ready(dropped.as_mut().poll(cx))).await;
                tokio::task::yield_now().await;
            }
            drop(dropped);
            let place = random.below(8 << 20).min((8 << 20) - 512);
            read(&disk, place, 512).await.unwrap();
        }
        disk.flush().await.unwrap();
        assert_eq!(server.connections(), 1);
    });
}

#[test]
fn workers_have_connections_of_their_own_where_that_is_safe() {
    for (flags, most, expected) in
        [(MULTI_CONN, 16, 3), (MULTI_CONN, 2, 2), (MULTI_CONN, 1, 1), (ALL_FLAGS, 16, 1)]
    {
        let server = Server::new(Offer { flags, ..offer(EXTENDED) });
        let disk = Arc::new(server.open(&NbdOptions { connections: most, ..options() }));
        assert!(disk.geometry().capabilities.contains(Capabilities::MULTI_CONN));
        let workers = Workers::start(3).unwrap();
        run(async {
            for round in 0..40_u8 {
                for worker in 0..3 {
                    let disk = disk.clone();
                    let work = move || async move {
                        let at = u64::from(round) * 512;
                        write(&disk, at, &[round; 512]).await.unwrap();
                        disk.flush().await.unwrap();
                        assert_eq!(read(&disk, at, 512).await.unwrap(), [round; 512]);
                    };
                    workers.run(worker, work).await.expect("it went well");
                }
                if server.connections() < expected {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            assert_eq!(server.connections(), expected);
            // A worker that ends takes its connections with it, and nothing else.
            drop(workers);
            assert_eq!(read(&disk, 512, 512).await.unwrap(), [1; 512]);
        });
    }
}

#[test]
fn a_second_connection_that_is_refused_is_done_without() {
    let server = Server::with_script(Offer { flags: MULTI_CONN, ..offer(EXTENDED) }, |seen| {
        if seen.connection > 0 { Act::HangUpAfter } else { Act::Well }
    });
    let disk = Arc::new(server.open(&options()));
    let workers = Workers::start(2).unwrap();
    run(async {
        for _ in 0..100 {
            for worker in 0..2 {
                let disk = disk.clone();
                let work = move || async move { read(&disk, 0, 512).await.map(drop) };
                workers.run(worker, work).await.unwrap().unwrap();
            }
        }
        assert!(server.connections() > 1);
    });
}

#[test]
fn no_more_requests_on_the_wire_than_allowed() {
    let seen = Arc::new(AtomicU64::new(0));
    let count = seen.clone();
    let server = Server::with_script(offer(EXTENDED), move |_| {
        count.fetch_add(1, SeqCst);
        Act::Silence
    });
    run(async {
        let disk = server.open(&NbdOptions { requests: 3, ..options() });
        let mut reads: Vec<_> = (0..10).map(|n| disk.read(n * 512, Buffer::new(512), Flags::NONE)).collect();
        let waited = tokio::time::timeout(Duration::from_millis(100), poll_all(&mut reads)).await;
        assert!(waited.is_err());
        assert_eq!(seen.load(SeqCst), 3);
    });
}

/// A server that says this to each client, then nothing, or hangs up.
fn odd_server(greeting: &'static [u8], hang_up: bool) -> (tempfile::TempDir, Uri) {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("sock")).unwrap();
    let uri = Uri::unix(&folder.path().join("sock"), "disk");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.write_all(greeting);
            if !hang_up {
                // Until the client leaves.
                let _ = stream.read_to_end(&mut Vec::new());
            }
        }
    });
    (folder, uri)
}

#[test]
fn servers_that_cannot_be_used_are_told_in_a_line() {
    let brief = NbdOptions { connect_timeout: Duration::from_millis(200), ..options() };
    for (greeting, hang_up, word) in [
        (&b""[..], true, "without a greeting"),
        (b"", false, "let 200ms pass"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", false, "no NBD server"),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53", false, "oldstyle"),
        (b"NBDMAGICIHAVEOPT\x00\x03", false, "let 200ms pass"),
        (b"NBDMAGICIHAVEOPT\x00\x00", true, "no export called \"disk\""),
        (b"NBDMAGICIHAVEOPT\x00\x02\xff\xff\xff\xff\xff\xff\xff\xff\x00\x01", false, "make no sense"),
    ] {
        let (_folder, uri) = odd_server(greeting, hang_up);
        let error = NbdBackend::open(&uri, &brief).err().unwrap().to_string();
        assert!(error.starts_with("nbd+unix:///disk?socket=") && error.contains(word), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
    let nobody: Uri = "nbd+unix:///?socket=/nonexistent/socket".parse().unwrap();
    let error = NbdBackend::open(&nobody, &brief).err().unwrap().to_string();
    assert!(error.contains("cannot connect: No such file"), "{error}");
    let nobody: Uri = "nbd://127.0.0.1:1/".parse().unwrap();
    let error = NbdBackend::open(&nobody, &brief).err().unwrap().to_string();
    assert!(error.contains("cannot connect to 127.0.0.1:1: Connection refused"), "{error}");
}

#[test]
fn a_server_with_fua_and_no_flush_gets_fua_on_every_change() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let flags = TransmissionFlags(ALL_FLAGS.0 & !TransmissionFlags::SEND_FLUSH.0);
    let note = seen.clone();
    let server = Server::with_script(Offer { flags, ..offer(STRUCTURED) }, move |seen| {
        note.lock().unwrap().push((seen.request.command, seen.request.flags.contains(CommandFlags::FUA)));
        Act::Well
    });
    let disk = server.open(&NbdOptions::default());
    assert!(disk.geometry().capabilities.contains(Capabilities::FLUSH | Capabilities::FUA));
    run(async {
        disk.write(0, Buffer::copy_of(&[1; 8192]), Flags::NONE).await.unwrap();
        disk.write_zeroes(0, 4096, Flags::NONE).await.unwrap();
        disk.trim(4096, 4096, Flags::NONE).await.unwrap();
        disk.flush().await.unwrap();
    });
    let expected = [Command::Write, Command::WriteZeroes, Command::Trim].map(|command| (command, true));
    assert_eq!(*seen.lock().unwrap(), expected, "no flush is sent to a server that has none");
}
