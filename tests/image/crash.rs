//! `kill -9` amid writes, again and again: what was flushed is there, and the image is in order.

use std::time::Duration;

use rustix::process::Signal;

use super::*;

const PAGE: usize = 4096;
const PAGES: usize = 2048;
const ROUNDS: usize = 50;

/// What a page was given.
#[derive(Clone)]
struct Page {
    /// Stamps, answered or not; 0 for zeroes.
    stamps: Vec<u64>,
    /// The oldest that may still be there, as an index.
    oldest: usize,
    /// How many of them the last kill left, one for each sector: none is newer than another.
    left: usize,
}

#[test]
fn a_kill_amid_writes_leaves_the_image_in_order() {
    if !has_qemu_img("a_kill_amid_writes_leaves_the_image_in_order") {
        return;
    }
    let mut random = Random::new(0x5eed_5006);
    let place = Place::new();
    let (base, image) = (place.file("base.raw", &vec![0; PAGES * PAGE]), place.path("disk.qcow2"));
    let mut pages = vec![Page { stamps: vec![0], oldest: 0, left: 1 }; PAGES];
    let mut next = 1;
    for round in 0..ROUNDS {
        if round % 10 == 0 {
            // A new image now and then: allocation is what is dangerous.
            let _ = fs::remove_file(&image);
            let cluster = ["cluster_size=64k", "cluster_size=512", "cluster_size=4k"][round / 10 % 3];
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                cluster,
                "-b",
                text(&base),
                "-F",
                "raw",
                text(&image),
            ]);
            pages.fill(Page { stamps: vec![0], oldest: 0, left: 1 });
        }
        let mut server = restart(&image);
        let mut client = server.client(ReplyStyle::Structured);
        for _ in 0..1 + random.index(6) {
            // What overlaps is not in flight at the same time: then nobody knows the order.
            let mut busy = Vec::new();
            for _ in 0..24 {
                let page = random.index(PAGES - 8);
                let range = page..page + 1 + random.index(8);
                if busy
                    .iter()
                    .any(|other: &std::ops::Range<usize>| other.start < range.end && range.start < other.end)
                {
                    busy.drain(..).for_each(|_| assert_eq!(client.answer().error, None));
                }
                let (offset, length) = ((page * PAGE) as u64, (range.len() * PAGE) as u64);
                let zero = random.below(6) == 0;
                let mut data = Vec::new();
                for page in &mut pages[range.clone()] {
                    let stamp = if zero { 0 } else { next };
                    next += u64::from(!zero);
                    data.extend(stamp.to_le_bytes().repeat(PAGE / 8));
                    page.stamps.push(stamp);
                }
                if zero {
                    client.ask(Nbd::WriteZeroes, NO_FLAGS, offset, length);
                } else {
                    client.ask_write(NO_FLAGS, offset, &data);
                }
                busy.push(range);
            }
            busy.drain(..).for_each(|_| assert_eq!(client.answer().error, None));
            client.flush();
            for page in pages.iter_mut().filter(|page| page.stamps.len() > page.left) {
                page.oldest = page.stamps.len() - 1;
            }
        }
        // And some that nobody waits for.
        for _ in 0..random.index(40) {
            let page = random.index(PAGES);
            pages[page].stamps.push(next);
            client.ask_write(NO_FLAGS, (page * PAGE) as u64, &next.to_le_bytes().repeat(PAGE / 8));
            next += 1;
        }
        std::thread::sleep(Duration::from_micros(random.below(3000)));
        server.signal(Signal::KILL);
        server.wait(Duration::from_secs(10)).unwrap();
        check(&image);
        let raw = place.path("now.raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(&image), text(&raw)]);
        for (n, (bytes, page)) in fs::read(&raw).unwrap().chunks(PAGE).zip(&mut pages).enumerate() {
            let mut found = Vec::new();
            // A write that was not flushed may be there in part: sectors are whole.
            for sector in bytes.chunks(512) {
                let stamp = u64::from_le_bytes(sector[..8].try_into().unwrap());
                assert!(sector.chunks(8).all(|part| part == &sector[..8]), "round {round}: page {n} is torn");
                let allowed = &page.stamps[page.oldest..];
                assert!(
                    allowed.contains(&stamp),
                    "round {round}: page {n} holds {stamp}, not one of {allowed:?}"
                );
                found.push(stamp);
            }
            *page = Page { left: found.len(), stamps: found, oldest: 0 };
        }
    }
}

/// After a kill the kernel may take a moment to let go of the image's locks.
fn restart(image: &Path) -> Server {
    let start = std::time::Instant::now();
    loop {
        match Server::try_serve(&[text(image)]) {
            Ok(server) => return server,
            Err(log) => assert!(log.contains("in use") && start.elapsed() < Duration::from_secs(5), "{log}"),
        }
    }
}
