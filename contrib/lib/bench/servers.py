"""The NBD servers: how each is started on an image, when it is ready, what it used.

Everybody runs with default options. What is given beside the image and the address only makes a server do what the
others do: serve for more than one client and not end with the first.
"""
import contextlib
import dataclasses
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable

import nbd
from process import Failed, cpu_seconds, end, last_line, memory_kib, start
from record import CEILING, OURS, PEER

START_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a server listens: a Unix socket, or a port of 127.0.0.1."""
    path: str = ""
    port: int = 0

    def uri(self, export=""):
        if self.path:
            return f"nbd+unix:///{export}?socket={self.path}"
        return f"nbd://127.0.0.1:{self.port}/{export}"

    def connect(self):
        if not self.path:
            return socket.create_connection(("127.0.0.1", self.port))
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(self.path)
        except OSError:
            sock.close()
            raise
        return sock


@dataclasses.dataclass(frozen=True)
class Target:
    """What is served: one image under the empty name, or many in one folder, each under the name of its file."""
    program: str
    images: tuple[str, ...]
    size_mib: int
    direct: bool = False
    every_extent: bool = False  # the ceiling says that all of it is data


@dataclasses.dataclass(frozen=True)
class Server:
    name: str
    role: str
    tool: str  # the command, and the Debian packages that may have it
    packages: tuple[str, ...]
    command: Callable[[Target, Place], list[str]]
    many: bool = False  # can serve many exports at once


def nbdbridge(target, place):
    images = target.images
    what = list(images) if len(images) == 1 else [f"--export={os.path.basename(path)}={path}" for path in images]
    where = ["-k", place.path] if place.path else ["-b", "127.0.0.1", "-p", str(place.port)]
    return [target.program, "net", *what, *where, *(["--cache", "none"] if target.direct else [])]


def nbdkit(target, place, plugin):
    where = ["-U", place.path] if place.path else ["-i", "127.0.0.1", "-p", str(place.port)]
    return ["nbdkit", "-f", *where, *plugin]


def nbdkit_file(target, place):
    if len(target.images) > 1:
        return nbdkit(target, place, ["file", f"dir={os.path.dirname(target.images[0])}"])
    # It has no O_DIRECT; this drops from the page cache what went through it.
    return nbdkit(target, place, ["file", target.images[0], *(["cache=none"] if target.direct else [])])


def nbdkit_null(target, place):
    # Without the filter it is one big hole, and a client that asks for extents reads nothing.
    honest = ["--filter=noextents"] if target.every_extent else []
    return nbdkit(target, place, [*honest, "null", f"{target.size_mib}M"])


def qemu_nbd(target, place):
    where = ["-k", place.path] if place.path else ["-b", "127.0.0.1", "-p", str(place.port)]
    return ["qemu-nbd", "-f", "raw", "-t", "-e", "0", *where, *(["-n"] if target.direct else []), target.images[0]]


def qemu_storage_daemon(target, place):
    where = f"unix,addr.path={place.path}" if place.path else f"inet,addr.host=127.0.0.1,addr.port={place.port}"
    command = ["qemu-storage-daemon", "--nbd-server", f"addr.type={where},max-connections=0"]
    cache = ",cache.direct=on,file.cache.direct=on" if target.direct else ""
    for number, path in enumerate(target.images):
        name = os.path.basename(path) if len(target.images) > 1 else ""
        command += ["--blockdev", f"driver=raw,node-name=n{number},file.driver=file,file.filename={path}{cache}",
                    "--export", f"type=nbd,id=x{number},node-name=n{number},name={name},writable=on"]
    return command


SERVERS = {server.name: server for server in (
    Server("nbdbridge", OURS, "", (), nbdbridge, many=True),
    Server("nbdkit file", PEER, "nbdkit", ("nbdkit",), nbdkit_file, many=True),
    Server("qemu-nbd", PEER, "qemu-nbd", ("qemu-utils",), qemu_nbd),
    # Debian 12 has it in qemu-system-common, 13 and the backports in qemu-utils.
    Server("qemu-storage-daemon", PEER, "qemu-storage-daemon", ("qemu-utils", "qemu-system-common"),
           qemu_storage_daemon, many=True),
    Server("nbdkit null", CEILING, "nbdkit", ("nbdkit",), nbdkit_null),
)}


def new_place(transport, folder):
    """A free address of a transport, "unix" or "tcp"."""
    if transport == "unix":
        path = f"{folder}/sock"
        pathlib.Path(path).unlink(missing_ok=True)
        return Place(path=path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Place(port=probe.getsockname()[1])


class Running:
    """A server that accepts clients."""

    def __init__(self, child, log, name):
        self.child, self.log, self.name = child, log, name

    def check(self):
        if self.child.poll() is not None:
            raise Failed(f"{self.name} ended with status {self.child.returncode}: {last_line(self.log)}")

    def cpu_seconds(self):
        self.check()
        return cpu_seconds(self.child.pid)

    def memory_kib(self, field):
        self.check()
        return memory_kib(self.child.pid, field)


@contextlib.contextmanager
def running(server, target, place):
    """Starts a server, waits until it greets a client, and ends it."""
    with tempfile.TemporaryFile() as log:
        child = start(server.command(target, place), log)
        try:
            up = Running(child, log, server.name)
            deadline = time.monotonic() + START_SECONDS
            while not nbd.greets(place):
                up.check()
                if time.monotonic() > deadline:
                    raise Failed(f"{server.name} did not greet within {START_SECONDS} s: {last_line(log)}")
                time.sleep(0.01)
            # Its farewell to that first client is no part of what is measured.
            time.sleep(0.05)
            try:
                yield up
            except Failed as error:
                # A client that failed seldom knows why.
                up.check()
                raise Failed(f"{error}; {server.name}: {last_line(log)}") from error
        finally:
            end(child)
