"""Suite `fuse`: an image as a FUSE file, ours beside qemu-storage-daemon's and nbdfuse's, in turn (A B C, A B C).

The client is fio with io_uring and O_DIRECT on the file: the kernel's FUSE is the same for everybody, what differs is who
answers it. nbdfuse is measured with the server behind it (nbdkit file), whose CPU time counts as its own.
"""
import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable

from cells import FULL, READ, WRITE, Cell
from clients import Job, fio_outcome
from net import failing_into, fill, shown
from process import Failed, cpu_seconds, end, last_line, memory_kib, run_client, start
from record import OURS, PEER, Record
from storage import storages, workplace

NAME = "fuse"
HELP = "FUSE files side by side; needs root"
START_SECONDS = 1.0  # what a run takes beside its time: a guess, for the forecast
MOUNT_SECONDS = 20

CELLS = [Cell("4k read QD32", READ, 4, 32), Cell("4k write QD32", WRITE, 4, 32),
         Cell("1M read QD8", READ, 1024, 8, sequential=True), Cell("1M write QD8", WRITE, 1024, 8, sequential=True)]


@dataclasses.dataclass(frozen=True)
class Mounter:
    name: str
    role: str
    tools: dict[str, str]  # commands, and the Debian packages that have them
    command: Callable[[str, str, str], list[str]]  # program, image, file


def nbdbridge(program, image, file):
    return [program, "fuse", image, file]


def qemu_storage_daemon(_program, image, file):
    return ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=n,filename={image}",
            "--export", f"fuse,id=x,node-name=n,mountpoint={file},writable=on"]


def nbdfuse(_program, image, file):
    return ["nbdfuse", file, "[", "nbdkit", "--exit-with-parent", "file", image, "]"]


MOUNTERS = (
    Mounter("nbdbridge", OURS, {}, nbdbridge),
    Mounter("qemu-storage-daemon", PEER, {"qemu-storage-daemon": "qemu-utils or qemu-system-common"},
            qemu_storage_daemon),
    Mounter("nbdfuse", PEER, {"nbdfuse": "libnbd-bin", "nbdkit": "nbdkit"}, nbdfuse),
)


def tools(_settings):
    return [("fio", ("fio",))]


def forecast_seconds(settings):
    # A guess at the peers: they are looked for when the suite runs.
    return len(CELLS) * len(settings.storages[:2]) * len(MOUNTERS) * settings.rounds * (settings.seconds + START_SECONDS)


def run(settings, records, say):
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        raise Failed("suite fuse: it needs root and /dev/fuse")
    mounters = [mounter for mounter in MOUNTERS if is_here(mounter, say)]
    # O_DIRECT below is about the storage, which is the same for everybody.
    names = [name for name in settings.storages if name != "direct"]
    for storage in storages(names, settings.tmpfs_folder, settings.disk_folder):
        with workplace(storage, settings.size_mib, [FULL], say) as (work, images):
            for number in range(1, settings.rounds + 1):
                for cell in CELLS:
                    for mounter in mounters:
                        record = Record(NAME, f"{storage.title}, FUSE file", cell.name, mounter.name, mounter.role,
                                        "fio io_uring", cell.unit, cell.per)
                        measure(record, mounter, images[FULL], work, cell, settings, number)
                        records.append(record)
                        say(f"round {number} of {settings.rounds}: {record.section}: {cell.name}: {mounter.name}: "
                            + shown(record))


def is_here(mounter, say):
    absent = [f"{tool} ({package})" for tool, package in mounter.tools.items() if not shutil.which(tool)]
    if absent:
        say(f"leaving out {mounter.name}: not installed: {', '.join(absent)}")
    return not absent


def measure(record, mounter, image, work, cell, settings, seed):
    with failing_into(record), mounted(mounter, settings.program, image, f"{work}/file") as (child, file):
        before = family_cpu(child.pid)
        job = Job(cell, [file], settings.size_mib, settings.seconds, seed, settings.program)
        done = run_client(fio_command(job), job.seconds * 10 + 300)
        spent = family_cpu(child.pid) - before
        fill(record, fio_outcome(done, cell), spent, memory_kib(child.pid, "VmHWM"))


def fio_command(job):
    cell = job.cell
    return ["fio", "--name=bench", f"--filename={job.uris[0]}", "--ioengine=io_uring", "--direct=1",
            f"--rw={cell.what if cell.sequential else 'rand' + cell.what}", f"--bs={cell.block_kib}k",
            f"--iodepth={cell.depth}", f"--size={job.size_mib}m", f"--randseed={job.seed}", "--norandommap",
            "--end_fsync=1", "--unified_rw_reporting=1", "--clat_percentiles=0", "--lat_percentiles=1",
            "--percentile_list=50:99:99.9", "--output-format=json", "--time_based", f"--runtime={job.seconds}"]


@contextlib.contextmanager
def mounted(mounter, program, image, file):
    """Mounts, waits until the file has its size, and takes it away again."""
    pathlib.Path(file).touch()
    size = os.stat(image).st_size
    with tempfile.TemporaryFile() as log:
        child = start(mounter.command(program, image, file), log)
        try:
            deadline = time.monotonic() + MOUNT_SECONDS
            while os.stat(file).st_size != size:
                if child.poll() is not None:
                    raise Failed(f"{mounter.name} ended with status {child.returncode}: {last_line(log)}")
                if time.monotonic() > deadline:
                    raise Failed(f"{mounter.name} did not mount within {MOUNT_SECONDS} s: {last_line(log)}")
                time.sleep(0.02)
            yield child, file
        finally:
            subprocess.run(["umount", "-l", file], stderr=subprocess.DEVNULL, check=False)
            end(child)


def family_cpu(pid):
    """CPU time of a process and of the children that it has now."""
    children = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                children.append(int(stat.parent.name))
    return sum(cpu_seconds(each) for each in (pid, *children))
