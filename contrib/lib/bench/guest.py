"""What suite `vm` runs inside the machine, as root, with the host's files in sight: makes a device by each way in turn
(A B C, A B C), over one image in memory, lets fio use it with O_DIRECT, and prints a record a line.

CPU time is that of the whole machine: much of what a device costs is the work of kernel threads, which is in no process's
clock. What is not fio's counts as the device's.
"""
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from cells import READ, WRITE, Cell
from clients import Job, fio_outcome
from fuse import fio_command
from process import Failed, end, last_line, run_client, start
from record import CEILING, OURS, PEER, Record
from servers import SERVERS, Place, Target, running
from storage import make_image

CELLS = [Cell("4k read QD32", READ, 4, 32), Cell("4k write QD32", WRITE, 4, 32),
         Cell("1M read QD8", READ, 1024, 8, sequential=True), Cell("1M write QD8", WRITE, 1024, 8, sequential=True)]
WORK = "/dev/shm"  # tmpfs
WAIT_SECONDS = 30
NBD = "/dev/nbd0"


@dataclasses.dataclass(frozen=True)
class Order:
    """What the host asks for."""
    program: str
    rublk: str  # "" where there is none
    size_mib: int
    rounds: int
    seconds: int


@contextlib.contextmanager
def ublk(order, image):
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as out:
        child = start([order.program, "ublk", image], log, out)
        try:
            yield until(lambda: os.pread(out.fileno(), 100, 0).decode().strip(), "nbdbridge ublk", child, log)
        finally:
            end(child)


@contextlib.contextmanager
def loop(_order, image):
    device = said(["losetup", "--find", "--show", image])
    try:
        yield device
    finally:
        said(["losetup", "--detach", device])


def rublk(*options):
    """It goes to the background by itself."""
    @contextlib.contextmanager
    def opened(order, image):
        said([order.rublk, "add", "loop", "--number", "7", "--file", image, *options])
        try:
            yield until(lambda: os.path.exists("/dev/ublkb7") and "/dev/ublkb7", "rublk")
        finally:
            said([order.rublk, "del", "--number", "7"])
    return opened


def nbd(name):
    """The kernel's NBD client on a server of suite net."""
    @contextlib.contextmanager
    def opened(order, image):
        place = Place(path=f"{WORK}/sock")
        pathlib.Path(place.path).unlink(missing_ok=True)
        with running(SERVERS[name], Target(order.program, (image,), order.size_mib), place):
            said(["nbd-client", "-unix", place.path, NBD, "-block-size", "512"])
            try:
                yield NBD
            finally:
                said(["nbd-client", "-d", NBD])
    return opened


CONTESTANTS: dict[str, tuple[str, Callable]] = {
    "nbdbridge ublk": (OURS, ublk),
    "rublk loop": (PEER, rublk()),
    "rublk loop -z": (PEER, rublk("--zero-copy")),
    "kernel nbd, qemu-nbd": (PEER, nbd("qemu-nbd")),
    "kernel nbd, nbdbridge": (CEILING, nbd("nbdbridge")),
    "kernel loop": (CEILING, loop),
}


def said(command):
    """The first line of a program that ends well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    words = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        raise Failed(f"{' '.join(command)}: status {done.returncode}: {words[-1] if words else 'it said nothing'}")
    return words[0] if words else ""


def until(look, name, child=None, log=None):
    """What `look` finds at last."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := look()):
        if child and child.poll() is not None:
            raise Failed(f"{name} ended with status {child.returncode}: {last_line(log)}")
        if time.monotonic() > deadline:
            raise Failed(f"{name}: no device within {WAIT_SECONDS} s")
        time.sleep(0.02)
    return found


def busy_seconds():
    """Time that all processors have worked so far."""
    with open("/proc/stat", encoding="ascii") as stat:
        _, user, nice, system, _idle, _iowait, irq, softirq, *_ = stat.readline().split()
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def measure(record, opened, order, image, cell, seed):
    with opened(order, image) as device:
        job = Job(cell, [device], order.size_mib, order.seconds, seed, order.program)
        before = busy_seconds()
        done = run_client(fio_command(job), job.seconds * 10 + 300)
        spent = busy_seconds() - before
        outcome = fio_outcome(done, cell)
    record.rate, record.p50_us, record.p99_us, record.p999_us = (
        outcome.rate, outcome.p50_us, outcome.p99_us, outcome.p999_us)
    record.server_cpu_us = (spent - outcome.cpu_seconds) / outcome.count * 1e6
    record.total_cpu_us = spent / outcome.count * 1e6


def tell(word, value):
    print(word, json.dumps(value), flush=True)


def chosen(order):
    """Who can be had: rublk where it was found, without copies where the kernel can do that (6.16)."""
    features = subprocess.run([order.program, "devices", "--features"], capture_output=True, text=True, check=True)
    zero_copy = re.search("^AUTO_BUF_REG +yes", features.stdout, re.MULTILINE)
    return {name: way for name, way in CONTESTANTS.items()
            if not name.startswith("rublk") or (order.rublk and (zero_copy or not name.endswith("-z")))}


def main(order):
    subprocess.run(["modprobe", "-a", "ublk_drv", "loop", "nbd"], check=True)
    contestants = chosen(order)
    image = f"{WORK}/image"
    make_image(image, order.size_mib)
    section = f"Linux {platform.release()} in QEMU (TCG), {os.cpu_count()} cores, image on tmpfs"
    for number in range(1, order.rounds + 1):
        for cell in CELLS:
            for name, (role, opened) in contestants.items():
                record = Record("vm", section, cell.name, name, role, "fio io_uring", cell.unit, cell.per)
                try:
                    measure(record, opened, order, image, cell, number)
                except (Failed, OSError, subprocess.SubprocessError) as error:
                    record.error = str(error)
                tell("record", dataclasses.asdict(record))
                outcome = f"FAILED: {record.error}" if record.error else f"{record.rate:,.0f} {record.unit}"
                tell("say", f"round {number} of {order.rounds}: {section}: {cell.name}: {name}: {outcome}")


if __name__ == "__main__":
    try:
        main(Order(**json.loads(sys.argv[1])))
    except (Failed, OSError, subprocess.SubprocessError) as error:
        tell("failed", str(error))
        sys.exit(1)
