"""A small NBD client: sees that a server is there, and holds a thousand connections open, idle or busy.

It is slow: what it measures is what a server needs for an I/O, not how many I/Os a server can do. fio would be quick,
but starts so many clients one after the other that the first have ended before the last begin.
"""
import random
import select
import struct
import time

from process import Failed

GREETING = b"NBDMAGICIHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
OPT_GO, REP_ACK, REP_ERROR = 7, 1, 1 << 31
REQUEST_MAGIC, SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
READ_BYTES = 4096
REPLY_HEAD = 16
WARM_SECONDS = 0.3


def greets(place):
    """Whether a server greets on this address."""
    try:
        with place.connect() as sock:
            sock.settimeout(5)
            return receive(sock, len(GREETING)) == GREETING
    except (OSError, Failed):
        return False


def open_export(place, export=""):
    """A connection in transmission, on which nothing is asked."""
    sock = place.connect()
    try:
        sock.settimeout(30)
        if receive(sock, len(GREETING)) != GREETING:
            raise Failed("the server does not greet as NBD servers do")
        receive(sock, 2)
        name = export.encode()
        body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        # The client's flags: fixed newstyle, no zeroes.
        sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", OPT_GO, len(body)) + body)
        while True:
            magic, option, kind, length = struct.unpack(">QIII", receive(sock, 20))
            receive(sock, length)
            if (magic, option) != (REPLY_MAGIC, OPT_GO) or kind & REP_ERROR:
                raise Failed(f"the server refuses export {export!r}: reply {kind:#x}")
            if kind == REP_ACK:
                return sock
    except BaseException:
        sock.close()
        raise


def keep_reading(socks, size_bytes, seconds, seed, clock):
    """Random reads of 4 KiB, one in flight on each connection: how many, in what time, and what `clock` went on by."""
    dice = random.Random(seed)
    offsets = [dice.randrange(size_bytes // READ_BYTES) * READ_BYTES for _ in range(4096)]
    requests = [struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 0, cookie, offset, READ_BYTES)
                for cookie, offset in enumerate(offsets)]
    busy = {sock.fileno(): Reader(sock, requests, index) for index, sock in enumerate(socks)}
    with select.epoll() as poll:
        for descriptor, reader in busy.items():
            poll.register(descriptor, select.EPOLLIN)
            reader.ask()
        turn(poll, busy, time.monotonic() + WARM_SECONDS)
        began, before = time.monotonic(), clock()
        count = turn(poll, busy, began + seconds)
        return count, time.monotonic() - began, clock() - before


def turn(poll, busy, until):
    """Answers with the next request until the time is over; how many were answered."""
    count = 0
    while time.monotonic() < until:
        for descriptor, _ in poll.poll(0.1):
            count += busy[descriptor].take()
    if not count:
        raise Failed("the server answers nobody")
    return count


class Reader:
    """A connection with one read in flight."""

    def __init__(self, sock, requests, start):
        self.sock, self.requests, self.next = sock, requests, start % len(requests)
        self.buffer = memoryview(bytearray(REPLY_HEAD + READ_BYTES))
        self.got = 0

    def ask(self):
        self.next = (self.next + 1) % len(self.requests)
        self.sock.sendall(self.requests[self.next])

    def take(self):
        """Takes what has come; 1 where that ended a reply, and asks for the next."""
        part = self.sock.recv_into(self.buffer[self.got:])
        if not part:
            raise Failed("the server closed a busy connection")
        self.got += part
        if self.got >= REPLY_HEAD:
            magic, error, cookie = struct.unpack_from(">IIQ", self.buffer)
            if (magic, error, cookie) != (SIMPLE_REPLY_MAGIC, 0, self.next):
                raise Failed(f"the server answers a read with magic {magic:#x}, error {error}")
        if self.got < len(self.buffer):
            return 0
        self.got = 0
        self.ask()
        return 1


def receive(sock, length):
    got = bytearray()
    while len(got) < length:
        part = sock.recv(length - len(got))
        if not part:
            raise Failed("the server closed the connection during the handshake")
        got += part
    return bytes(got)
