//! Servers that go away: for a while, for good, without a word, or to come back as another.

use super::*;

#[test]
fn requests_wait_for_a_server_that_comes_back() {
    let server = Server::new(offer(EXTENDED));
    run(async {
        let disk = server.open(&options());
        write(&disk, 4096, &[3; 512]).await.unwrap();
        server.go_away();
        let mut waiting: Vec<_> =
            (0..20).map(|n| disk.write(n * 512, Buffer::copy_of(&[4; 512]), Flags::NONE)).collect();
        let brief = Duration::from_millis(100);
        let early = tokio::time::timeout(brief, poll_all(&mut waiting)).await;
        assert!(early.is_err(), "there is nobody to answer");
        server.listen();
        poll_all(&mut waiting).await.into_iter().for_each(|result| result.unwrap());
        assert_eq!(read(&disk, 0, 20 * 512).await.unwrap(), [4; 20 * 512]);
    });
}

#[test]
fn a_server_that_stays_away_costs_errors_and_the_source_lives_on() {
    let server = Server::new(offer(STRUCTURED));
    run(async {
        let disk = server.open(&impatient());
        read(&disk, 0, 512).await.unwrap();
        server.go_away();
        let begun = Instant::now();
        let error = read(&disk, 0, 512).await.unwrap_err();
        assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}", begun.elapsed());
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("no connection"), "{error}");
        // Later ones have one attempt, which fails at once.
        tokio::time::sleep(Duration::from_millis(100)).await;
        for _ in 0..3 {
            assert_eq!(read(&disk, 0, 512).await.unwrap_err().kind(), ErrorKind::Io);
        }
        server.listen();
        let begun = Instant::now();
        while read(&disk, 0, 512).await.is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10));
        }
    });
}

#[test]
fn no_patience_at_all() {
    let server =
        Server::with_script(
            offer(STRUCTURED),
            |seen| {
                if seen.number == 1 { Act::HangUpAfter } else { Act::Well }
            },
        );
    run(async {
        let disk = server.open(&NbdOptions { reconnect_timeout: Duration::ZERO, ..options() });
        read(&disk, 0, 512).await.unwrap();
        let error = read(&disk, 0, 512).await.unwrap_err();
        assert!(error.to_string().contains("closed the connection"), "{error}");
        read_in_the_end(&disk, 0, 512).await;
    });
}

#[test]
fn silence_on_a_living_connection_is_cut_short() {
    let server = Server::with_script(offer(EXTENDED), |seen| match seen.request.offset {
        // Never answered.
        4096 => Act::Silence,
        // Answered when asked again.
        8192 if seen.connection == 0 => Act::Silence,
        _ => Act::Well,
    });
    run(async {
        let patience = Duration::from_millis(200);
        let disk = server.open(&NbdOptions {
            request_timeout: Some(patience),
            reconnect_timeout: Duration::from_millis(1500),
            ..options()
        });
        let begun = Instant::now();
        read(&disk, 8192, 512).await.unwrap();
        assert!(begun.elapsed() >= patience);
        let (lost, kept) = tokio::join!(read(&disk, 4096, 512), async {
            for _ in 0..100 {
                read(&disk, 0, 512).await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let error = lost.unwrap_err();
        assert!(error.to_string().contains("no answer for 200ms"), "{error}");
        let () = kept;
        read(&disk, 0, 512).await.unwrap();
    });
}

#[test]
fn a_server_that_is_shutting_down_is_asked_again_when_it_is_back() {
    let server = Server::with_script(offer(EXTENDED), |seen| {
        let Seen { style, request, .. } = *seen;
        match seen.connection {
            0 if seen.number > 0 => Act::Send(bytes(|out| {
                put_error(style, request.cookie, request.offset, NbdError::Shutdown, "", out);
            })),
            _ => Act::Well,
        }
    });
    run(async {
        let disk = server.open(&options());
        read(&disk, 0, 512).await.unwrap();
        write(&disk, 0, &[1; 512]).await.unwrap();
        assert_eq!(read(&disk, 0, 512).await.unwrap(), [1; 512]);
        assert_eq!(server.connections(), 2);
    });
}

#[test]
fn another_export_in_its_place_fails_the_source() {
    type Change = fn(&mut Offer);
    let changes: [(Change, &str); 4] = [
        (|offer| offer.size -= 512, "bytes now"),
        (|offer| offer.flags |= TransmissionFlags::READ_ONLY, "read-only now"),
        (|offer| offer.flags = offer.flags.without(TransmissionFlags::SEND_FUA), "SEND_FUA"),
        (|offer| offer.style = ReplyStyle::Simple, "base:allocation"),
    ];
    for (change, word) in changes {
        let server = Server::new(offer(EXTENDED));
        run(async {
            let disk = server.open(&options());
            read(&disk, 0, 512).await.unwrap();
            server.go_away();
            server.offer(change);
            server.listen();
            for _ in 0..2 {
                let error = read(&disk, 0, 512).await.unwrap_err();
                assert!(error.to_string().contains(word), "{error}");
            }
            assert_eq!(server.connections(), 2, "it is not asked again");
        });
    }
    // A larger one will do, as it was.
    let server = Server::new(offer(EXTENDED));
    run(async {
        let disk = server.open(&options());
        read(&disk, 0, 512).await.unwrap();
        server.go_away();
        server.offer(|offer| offer.size += 512);
        server.listen();
        read(&disk, 0, 512).await.unwrap();
        assert_eq!(disk.geometry().size, SIZE);
    });
}

#[test]
fn strict_makes_every_change_durable() {
    let loose = Arc::new(AtomicU64::new(0));
    let count = loose.clone();
    let server = Server::with_script(offer(STRUCTURED), move |seen| {
        let changes = matches!(seen.request.command, Command::Write | Command::WriteZeroes | Command::Trim);
        if changes && !seen.request.flags.contains(CommandFlags::FUA) {
            count.fetch_add(1, SeqCst);
        }
        Act::Well
    });
    let strict = NbdOptions { reconnect: Reconnect::Strict, ..options() };
    run(async {
        for (options, expected) in [(strict.clone(), 0), (options(), 3)] {
            let disk = server.open(&options);
            write(&disk, 0, &[1; 512]).await.unwrap();
            disk.trim(0, 512, Flags::NONE).await.unwrap();
            disk.write_zeroes(0, 512, Flags::NO_HOLE).await.unwrap();
            assert_eq!(loose.load(SeqCst), expected);
        }
    });
    server.offer(|offer| offer.flags = offer.flags.without(TransmissionFlags::SEND_FUA));
    let error = NbdBackend::open(&server.uri(), &strict).err().unwrap().to_string();
    assert!(error.contains("needs FUA"), "{error}");
    // Who changes nothing needs nothing.
    server.offer(|offer| offer.flags |= TransmissionFlags::READ_ONLY);
    NbdBackend::open(&server.uri(), &strict).unwrap();
}
