"""Holds the partitions that nbdbridge finds against those that this kernel makes, on the disks of tables.py.

    python3 tests/vm/table_check.py PROGRAM FOLDER SEED

For each disk: a loop device with its sectors, for some a ublk device, and `nbdbridge info --json` of the image. A partition
is the same in all of them: number, start, length; its bytes are those that `nbdbridge net --partition` serves. Where the
kernel has one that we do not serve, our refusal says why. Where we serve one that the kernel does not have, the server
says why. `partx`, which reads the table itself, has the same ones where all is in order.
"""

import json
import os
import subprocess
import sys
import time

import tables

program, folder, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
# The kernel counts no further (DISK_MAX_PARTS).
MOST = 255
# What the kernel reads is read through our device as well: some of each kind.
ON_UBLK = ("logical", "logical-4096", "two-extended", "cut-in-a-primary", "gpt-512", "gpt-4096", "gpt-2048-entries", "gpt-hybrid")
failures, served, refused = 0, 0, 0


def run(*words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        sys.exit(f"{words}: {done.stderr}")
    return done.stdout


def read(*path):
    with open(os.path.join(*path)) as file:
        return file.read().strip()


def of_kernel(device):
    """Number: (start, length) in bytes, of a device whose table was read."""
    top = "/sys/block/" + os.path.basename(device)
    found = {}
    for name in os.listdir(top):
        if os.path.exists(os.path.join(top, name, "partition")):
            number, start, size = (int(read(top, name, field)) for field in ("partition", "start", "size"))
            found[number] = (start * 512, size * 512)
    return found


def of_partx(device):
    """As above; partx may find none, and says so by its status."""
    words = ["partx", "--raw", "--noheadings", "-o", "NR,START,SECTORS", device]
    lines = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.splitlines()
    return {int(n): (int(start) * 512, int(size) * 512) for n, start, size in (line.split() for line in lines)}


def of_ours(image, sector):
    """The same, the extended ones, and what the table is said to lack."""
    told = json.loads(run(program, "info", "--json", "--sector-size", str(sector), image)).get("partition-table")
    if not isinstance(told, dict):
        return {}, [], told
    found = {one["number"]: (one["start"], one["length"]) for one in told["partitions"]}
    return found, told.get("extended", []), told.get("flaw")


def serve(image, sector, number):
    """The bytes of a partition; or the line that says why it is not served."""
    socket, out, copy = (os.path.join(folder, name) for name in ("sock", "out", "copy"))
    words = [program, "net", image, "-r", "-f", "raw", "--partition", str(number), "--sector-size", str(sector), "-k", socket]
    with open(out, "w") as told:
        server = subprocess.Popen(words, stdout=told, stderr=subprocess.PIPE, text=True)
    while os.path.getsize(out) == 0:
        if server.poll() is not None:
            line = server.stderr.read()
            assert line.count("\n") == 1 and server.returncode == 1, line
            return None, line
        time.sleep(0.02)
    run("nbdcopy", "nbd+unix:///?socket=" + socket, copy)
    server.terminate()
    said = server.communicate(timeout=60)[1]
    with open(copy, "rb") as file:
        return file.read(), said


class Ublk:
    """A device of ours, whose table the kernel has read."""

    def __init__(self, image, sector):
        words = [program, "ublk", image, "-f", "raw", "--read-only", "--scan-partitions", "--block-size", str(sector)]
        self.server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.device = self.server.stdout.readline().strip()

    def end(self):
        self.server.terminate()
        assert self.server.wait(60) == 0


def check(name, sector, image):
    """The words that say what differs."""
    global served, refused
    loop = run("losetup", "--find", "--show", "--read-only", "--partscan", "--sector-size", str(sector), image).strip()
    device = None
    try:
        kernel, partx = of_kernel(loop), of_partx(loop)
        ours, extended, flaw = of_ours(image, sector)
        size = os.path.getsize(image)
        print(f"{name}: kernel {len(kernel)}, partx {len(partx)}, ours {len(ours)}" + (f"; {flaw}" if flaw else ""), flush=True)
        if name in ON_UBLK:
            device = Ublk(image, sector)
            # Newer kernels read the table a moment after the device is there.
            until = time.monotonic() + 20
            while of_kernel(device.device) != kernel and time.monotonic() < until:
                time.sleep(0.1)
            if of_kernel(device.device) != kernel:
                yield f"on ublk {of_kernel(device.device)}, on loop {kernel}"
        if not flaw and {n: place for n, place in ours.items() if sum(place) <= size} != {
            n: place for n, place in partx.items() if n not in extended and sum(place) <= size
        }:
            yield f"partx has {partx}, ours are {ours}"
        on_loop_only = [n for n in kernel if n not in ours and n not in extended]
        if on_loop_only and not flaw:
            yield f"only in the kernel: {on_loop_only}"
        for number, (start, length) in sorted(ours.items()):
            there = kernel.get(number)
            # The bytes of the first and the last one, and of all that the kernel has not, or has otherwise.
            if there == (start, length) and number not in (min(ours), max(ours)):
                continue
            bytes_, line = serve(image, sector, number)
            if bytes_ is None:
                refused += 1
                if start + length <= size or "cut short" not in line:
                    yield f"{number} is refused: {line}"
                if there not in (None, (start, size - start)):
                    yield f"{number}: {there} in the kernel, {start, length} ours"
                continue
            served += 1
            if len(bytes_) != length:
                yield f"{number}: {len(bytes_)} bytes are served"
            if there is None:
                if number <= MOST and not (flaw and flaw in line) and "the copy" not in line:
                    yield f"only ours, and the server does not say why: {number} at {start}, {length} ({line})"
                continue
            if there != (start, length):
                yield f"{number}: {there} in the kernel, {start, length} ours"
                continue
            with open(f"{loop}p{number}", "rb") as file:
                if file.read() != bytes_:
                    yield f"{number}: other bytes"
    finally:
        if device:
            device.end()
        run("losetup", "--detach", loop)


for name, sector, disk in tables.cases(seed):
    image = os.path.join(folder, "table.img")
    with open(image, "wb") as file:
        file.write(disk)
    for words in check(name, sector, image):
        failures += 1
        print(f"  {name}: {words}", flush=True)
print(f"served {served}, refused {refused}, differences {failures}")
sys.exit(failures > 0 or served < 40)
