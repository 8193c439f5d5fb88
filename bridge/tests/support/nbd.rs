//! A small NBD server on a Unix socket, over a disk in memory: as good as asked for, or as bad.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use bridge::backend::memory::MemoryBackend;
use bridge::backend::nbd::{NbdBackend, NbdOptions};
use bridge::random::Random;
use bridge::{Backend, ExtentKind, Flags};
use nbd_proto::uri::Uri;
use nbd_proto::{
    Command, CommandFlags, Directory, ExportInfo, Handshake, Limits, NbdError, OptionCode, ReplyStyle,
    Request, Step, TlsPolicy, TransmissionFlags, put_block_status, put_data_header, put_done, put_error,
    put_hole,
};

/// What a server does about a request instead of answering it well.
pub enum Act {
    /// Answers it well.
    Well,
    /// Sends this.
    Send(Vec<u8>),
    /// Answers it well, but for some bits, which the seed chooses.
    Garble(u64),
    /// Says nothing.
    Silence,
    /// Carries it out, and hangs up instead of telling.
    HangUpAfter,
}

type Script = dyn Fn(&Seen<'_>) -> Act + Send + Sync;

/// A request, as a script sees it.
pub struct Seen<'a> {
    /// Counts the connections, from 0.
    pub connection: u64,
    /// Counts the requests of all connections, from 0.
    pub number: u64,
    pub style: ReplyStyle,
    pub request: &'a Request,
}

/// What a server offers.
pub struct Offer {
    pub size: u64,
    pub style: ReplyStyle,
    pub flags: TransmissionFlags,
    /// Minimum, preferred, largest payload.
    pub blocks: [u32; 3],
}

pub const ALL_FLAGS: TransmissionFlags = TransmissionFlags(
    TransmissionFlags::HAS_FLAGS.0
        | TransmissionFlags::SEND_FLUSH.0
        | TransmissionFlags::SEND_FUA.0
        | TransmissionFlags::SEND_TRIM.0
        | TransmissionFlags::SEND_WRITE_ZEROES.0
        | TransmissionFlags::SEND_FAST_ZERO.0
        | TransmissionFlags::SEND_CACHE.0,
);

impl Offer {
    /// All there is but several connections.
    pub fn new(size: u64, style: ReplyStyle) -> Offer {
        Offer { size, style, flags: ALL_FLAGS, blocks: [1, 4096, 32 << 20] }
    }
}

/// The server. Dropped, it ends with its connections.
pub struct Server {
    shared: Arc<Shared>,
    folder: tempfile::TempDir,
}

struct Shared {
    offer: Mutex<Offer>,
    disk: MemoryBackend,
    script: Box<Script>,
    /// Ends the present listener.
    over: Mutex<Arc<AtomicBool>>,
    connections: AtomicU64,
    requests: AtomicU64,
    open: Mutex<Vec<UnixStream>>,
}

impl Server {
    pub fn new(offer: Offer) -> Server {
        Server::with_script(offer, |_| Act::Well)
    }

    pub fn with_script(offer: Offer, script: impl Fn(&Seen<'_>) -> Act + Send + Sync + 'static) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let disk = MemoryBackend::new(offer.size);
        let shared = Arc::new(Shared {
            offer: Mutex::new(offer),
            disk,
            script: Box::new(script),
            over: Mutex::default(),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let server = Server { shared, folder };
        server.listen();
        server
    }

    /// Begins to take clients.
    pub fn listen(&self) {
        let path = self.folder.path().join("sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        let (shared, over) = (self.shared.clone(), Arc::new(AtomicBool::new(false)));
        *shared.over.lock().unwrap() = over.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if over.load(SeqCst) {
                    return;
                }
                let (shared, stream) = (shared.clone(), stream.unwrap());
                let number = shared.connections.fetch_add(1, SeqCst);
                shared.open.lock().unwrap().push(stream.try_clone().unwrap());
                std::thread::spawn(move || {
                    // However it ends: the client hears of it by the close.
                    let _ = shared.serve(&stream, number);
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                });
            }
        });
    }

    /// Drops all clients and takes no more, until it listens again.
    pub fn go_away(&self) {
        self.shared.over.lock().unwrap().store(true, SeqCst);
        // The listener ends at its next client.
        let _ = UnixStream::connect(self.folder.path().join("sock"));
        let _ = std::fs::remove_file(self.folder.path().join("sock"));
        for stream in self.shared.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// What it offers from the next client on.
    pub fn offer(&self, change: impl FnOnce(&mut Offer)) {
        change(&mut self.shared.offer.lock().unwrap());
    }

    pub fn connections(&self) -> u64 {
        self.shared.connections.load(SeqCst)
    }

    pub fn disk(&self) -> &MemoryBackend {
        &self.shared.disk
    }

    pub fn uri(&self) -> Uri {
        Uri::unix(&self.folder.path().join("sock"), "")
    }

    pub fn open(&self, options: &NbdOptions) -> NbdBackend {
        NbdBackend::open(&self.uri(), options).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.go_away();
    }
}

impl Directory for Shared {
    fn list(&self, each: &mut dyn FnMut(&str, Option<&str>)) {
        each("", None);
    }

    fn find(&self, name: &str) -> Option<(String, ExportInfo)> {
        let offer = self.offer.lock().unwrap();
        let [min_block, preferred_block, max_payload] = offer.blocks;
        let info = ExportInfo {
            size: offer.size,
            flags: offer.flags,
            description: None,
            min_block,
            preferred_block,
            max_payload,
        };
        name.is_empty().then(|| (String::new(), info))
    }

    fn contexts(&self, _name: &str) -> Vec<String> {
        vec!["base:allocation".into()]
    }
}

impl Shared {
    fn serve(&self, mut stream: &UnixStream, connection: u64) -> std::io::Result<()> {
        let mut handshake = Handshake::new(Limits::default(), TlsPolicy::Disabled);
        stream.write_all(&handshake.greeting())?;
        let (mut buf, mut out, mut input) = ([0; 4096], Vec::new(), Vec::new());
        let style = self.offer.lock().unwrap().style;
        let negotiated = 'handshake: loop {
            let n = stream.read(&mut buf)?;
            if n == 0 {
                return Ok(());
            }
            input.extend_from_slice(&buf[..n]);
            loop {
                // Options that are above its style are unknown to it: so their number is changed on the way.
                hide_options(&mut input, style);
                let (used, step) = handshake.advance(&input, self, &mut out);
                input.drain(..used);
                unhide_replies(&mut out);
                stream.write_all(&out)?;
                out.clear();
                match step {
                    Step::NeedMore => break,
                    Step::Flush => {}
                    Step::Transmission(negotiated) => break 'handshake negotiated,
                    _ => return Ok(()),
                }
            }
        };
        assert!(input.is_empty(), "a client waits for the end of the handshake");
        let style = negotiated.style;
        let extended = style.extended();
        let context = negotiated.contexts.first().map(|context| context.id);
        let mut head = vec![0; Request::header_len(extended)];
        loop {
            stream.read_exact(&mut head)?;
            let request = Request::parse(&head, extended).unwrap().unwrap();
            if request.command == Command::Disconnect {
                return Ok(());
            }
            let mut payload = vec![0; usize::try_from(request.payload_len(extended)).unwrap()];
            stream.read_exact(&mut payload)?;
            let number = self.requests.fetch_add(1, SeqCst);
            out.clear();
            match (self.script)(&Seen { connection, number, style, request: &request }) {
                Act::Well => {
                    self.answer(&request, &payload, style, context, &mut out);
                    stream.write_all(&out)?;
                }
                Act::Garble(seed) => {
                    self.answer(&request, &payload, style, context, &mut out);
                    let mut random = Random::new(seed);
                    for _ in 0..=random.below(3) {
                        // Headers are where it hurts.
                        let near = random.below(out.len().min(80) as u64);
                        out[usize::try_from(near).unwrap()] ^= 1 << random.below(8);
                    }
                    stream.write_all(&out)?;
                }
                Act::Send(bytes) => stream.write_all(&bytes)?,
                Act::Silence => {}
                Act::HangUpAfter => {
                    self.answer(&request, &payload, style, context, &mut out);
                    return Ok(());
                }
            }
        }
    }

    fn answer(
        &self,
        request: &Request,
        payload: &[u8],
        style: ReplyStyle,
        context: Option<u32>,
        out: &mut Vec<u8>,
    ) {
        let Request { cookie, offset, length, flags, command } = *request;
        let max_payload = u64::from(self.offer.lock().unwrap().blocks[2]);
        let end = offset.checked_add(length).filter(|end| *end <= self.disk.geometry().size);
        let carries = matches!(command, Command::Read | Command::Write);
        let min_block = u64::from(self.offer.lock().unwrap().blocks[0]);
        let aligned = offset.is_multiple_of(min_block) && length.is_multiple_of(min_block);
        if end.is_none() || !aligned || carries && length > max_payload {
            return put_error(style, cookie, offset, NbdError::Inval, "out of bounds", out);
        }
        let zero_flags = if flags.contains(CommandFlags::NO_HOLE) { Flags::NO_HOLE } else { Flags::NONE };
        match command {
            Command::Read => {
                let mut data = vec![0; usize::try_from(length).unwrap()];
                self.disk.try_read(offset, &mut data, Flags::NONE).unwrap().unwrap();
                if style == ReplyStyle::Simple {
                    put_data_header(style, cookie, offset, offset, u32::try_from(length).unwrap(), true, out);
                    out.extend_from_slice(&data);
                    return;
                }
                // In pieces, the last one first, holes as such, and the end told for itself.
                let mut pieces: Vec<_> = data.chunks(50_000).enumerate().collect();
                pieces.reverse();
                for (n, piece) in pieces {
                    let at = offset + 50_000 * n as u64;
                    let len = u32::try_from(piece.len()).unwrap();
                    if piece.iter().all(|byte| *byte == 0) {
                        put_hole(style, cookie, offset, at, len, false, out);
                    } else {
                        put_data_header(style, cookie, offset, at, len, false, out);
                        out.extend_from_slice(piece);
                    }
                }
            }
            Command::Write => self.disk.try_write(offset, payload, Flags::NONE).unwrap().unwrap(),
            Command::Trim => at_once(self.disk.trim(offset, length, Flags::NONE)).unwrap(),
            Command::WriteZeroes => at_once(self.disk.write_zeroes(offset, length, zero_flags)).unwrap(),
            Command::Flush | Command::Cache => {}
            Command::BlockStatus => {
                let Some(context) = context else {
                    return put_error(style, cookie, offset, NbdError::Inval, "", out);
                };
                let found = at_once(self.disk.block_status(offset, length, Flags::NONE)).unwrap();
                let most = if flags.contains(CommandFlags::REQ_ONE) { 1 } else { found.len() };
                let state = |kind| match kind {
                    ExtentKind::Data => 0,
                    ExtentKind::Zero => 2,
                    ExtentKind::Hole => 3,
                    ExtentKind::HoleNotZero => 1,
                };
                let extents: Vec<(u64, u32)> =
                    found[..most].iter().map(|extent| (extent.len, state(extent.kind))).collect();
                return put_block_status(style, cookie, offset, context, &extents, true, out);
            }
            _ => return put_error(style, cookie, offset, NbdError::Inval, "", out),
        }
        put_done(style, cookie, offset, out);
    }
}

/// The number that stands in for an option the server does not have.
const UNKNOWN: u32 = 0x7fff_0000;

fn hide_options(input: &mut [u8], style: ReplyStyle) {
    let hidden: &[OptionCode] = match style {
        ReplyStyle::Simple => &[OptionCode::ExtendedHeaders, OptionCode::StructuredReply],
        ReplyStyle::Structured => &[OptionCode::ExtendedHeaders],
        ReplyStyle::Extended => &[],
    };
    // The client sends one option at a time, so that it stands at the end.
    let start = input.len().wrapping_sub(16);
    if let Some(option) = input.get_mut(start.wrapping_add(8)..start.wrapping_add(12)) {
        let number = u32::from_be_bytes(option.try_into().unwrap());
        if hidden.iter().any(|code| code.wire() == number) {
            option.copy_from_slice(&(UNKNOWN + number).to_be_bytes());
        }
    }
}

fn unhide_replies(out: &mut [u8]) {
    if let Some(option) = out.get_mut(8..12) {
        let number = u32::from_be_bytes(option.try_into().unwrap());
        if number > UNKNOWN {
            option.copy_from_slice(&(number - UNKNOWN).to_be_bytes());
        }
    }
}

/// What a disk in memory answers is there at once.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("memory does not wait"),
    }
}
