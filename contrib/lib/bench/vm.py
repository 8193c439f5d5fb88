"""Suite `vm`: block devices on this host's own kernel, side by side in one boot of the test VM (tests/vm/run): ublk on
nbdbridge beside rublk, and the kernel's NBD client beside qemu-nbd; the kernel's own loop device is a mark.

This module boots the machine and takes in what guest.py prints there, a record a line.
"""
import dataclasses
import json
import shlex
import shutil
import subprocess
import tempfile

import guest
import machine
from process import Failed, last_line
from record import Record

NAME = "vm"
HELP = "kernel devices in the test VM: ublk, loop, nbd"
START_SECONDS = 1.6  # what a run takes beside its time: a guess, for the forecast
BOOT_SECONDS = 30
RUN = machine.ROOT / "tests/vm/run"
RUBLK = machine.ROOT / "target/tools/bin/rublk"
MEMORY = 512  # MiB beside the image, which lies in the machine's memory


def tools(_settings):
    return [("fio", ("fio",)), ("nbd-client", ("nbd-client",)), ("qemu-nbd", ("qemu-utils",))]


def forecast_seconds(settings):
    runs = len(guest.CELLS) * len(guest.CONTESTANTS) * settings.rounds
    return len(settings.kernels) * (BOOT_SECONDS + runs * (settings.seconds + START_SECONDS))


def run(settings, records, say):
    rublk = find_rublk(say)
    for kernel in settings.kernels:
        order = guest.Order(settings.program, rublk, settings.size_mib, settings.rounds, settings.seconds)
        for word, value in said_by_guest(settings, kernel, order):
            if word == "record":
                records.append(Record(**value))
            elif word == "say":
                say(value)
            else:
                raise Failed(f"suite {NAME}: {value}")


def find_rublk(say):
    """rublk is another's program under another licence (GPL): built beside ours where cargo can have it, only ever run."""
    found = shutil.which("rublk") or (str(RUBLK) if RUBLK.exists() else "")
    if not found:
        say("leaving out rublk: it is not installed (cargo install rublk --root target/tools, which needs libclang)")
    return found


def said_by_guest(settings, kernel, order):
    """Boots the machine; yields what it says, as pairs of a word and a value."""
    script = machine.ROOT / "contrib/lib/bench/guest.py"
    command = ["python3", "-B", str(script), json.dumps(dataclasses.asdict(order))]
    limit = int(forecast_seconds(settings) * 3) + 300
    words = [str(RUN), "--kernel", kernel, "--memory", f"{settings.size_mib * 2 + MEMORY}M", "--timeout", str(limit),
             shlex.join(command)]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                                 cwd=machine.ROOT, start_new_session=True)
        try:
            for line in child.stdout:
                word, _, rest = line.partition(" ")
                if word in ("record", "say", "failed"):
                    yield word, json.loads(rest)
            if child.wait():
                raise Failed(f"suite {NAME}: the machine ended with status {child.returncode}: {last_line(log)}")
        finally:
            end(child)


def end(child):
    """The machine is a grandchild, of the child's session: it ends with the group."""
    if child.poll() is None:
        subprocess.run(["kill", "-TERM", "--", f"-{child.pid}"], check=False)
        child.wait()
