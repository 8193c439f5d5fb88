"""The clients: how a cell is run against a URI, and what the client says of it.

A client that reports an error, ends with one, or did nothing at all makes the run fail: its figures are never used.
"""
import dataclasses
import json
import time
from collections.abc import Callable

from cells import COPY, MIXED, READ, WRITE, Cell
from process import Failed, run_client


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of one client. With several URIs, connection N goes to the Nth of them."""
    cell: Cell
    uris: list[str]
    size_mib: int
    seconds: int
    seed: int
    program: str  # our own, for its load generator


@dataclasses.dataclass
class Outcome:
    """What one run gave."""
    rate: float  # in the cell's unit
    count: float  # of what CPU times are divided by
    cpu_seconds: float  # of the client
    p50_us: float | None = None
    p99_us: float | None = None
    p999_us: float | None = None


@dataclasses.dataclass(frozen=True)
class Client:
    tool: str  # the command, and the Debian package that has it; none for our own
    package: str
    suits: Callable[[Cell], bool]
    run: Callable[[Job], Outcome]
    by_default: bool = True


def fio_command(job):
    """fio's nbd engine. Ends with a flush where it wrote."""
    cell, uris, size_mib = job.cell, job.uris, job.size_mib
    kind = {MIXED: "rw"}.get(cell.what, cell.what)
    part = size_mib // cell.connections if cell.sequential else size_mib
    command = ["fio", "--ioengine=nbd", "--thread", f"--rw={kind if cell.sequential else 'rand' + kind}",
               f"--bs={cell.block_kib}k", f"--iodepth={cell.depth}", f"--size={part}m", f"--randseed={job.seed}",
               "--norandommap", "--end_fsync=1", "--group_reporting", "--unified_rw_reporting=1",
               "--clat_percentiles=0", "--lat_percentiles=1", "--percentile_list=50:99:99.9", "--output-format=json",
               "--time_based", f"--runtime={job.seconds}"]
    if cell.sequential and cell.connections > 1:
        command.append(f"--offset_increment={part}m")
    if len(uris) == 1:
        return [*command, f"--numjobs={cell.connections}", "--name=bench", f"--uri={uris[0]}"]
    for number in range(cell.connections):
        command += [f"--name=job{number}", f"--uri={uris[number % len(uris)]}"]
    return command


def fio(job):
    # A flush of what was written at the page cache's pace may take its time.
    done = run_client(fio_command(job), job.seconds * 10 + 300)
    try:
        # Notices may come before the JSON.
        group = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
        both, slow = group["mixed"], group["mixed"]["lat_ns"].get("percentile", {})
        if group["error"] or not both["total_ios"]:
            raise Failed(f"fio: error {group['error']} after {both['total_ios']} I/Os")
        return Outcome(
            rate=both["iops"] if job.cell.unit == "IOPS" else both["bw_bytes"] / 1e6,
            count=both["total_ios"], cpu_seconds=done.cpu_seconds,
            p50_us=slow["50.000000"] / 1e3, p99_us=slow["99.000000"] / 1e3, p999_us=slow["99.900000"] / 1e3)
    except (ValueError, KeyError, IndexError) as error:
        raise Failed(f"fio: its report is not understood ({error!r})") from error


def nbdbridge(job):
    """Our own load generator. It ends without a flush; of a mix the slower side's latency counts."""
    cell = job.cell
    share = {READ: [], WRITE: ["--write"], MIXED: ["--write", "--read-percent", "50"]}[cell.what]
    order = ["--sequential"] if cell.sequential else []
    command = [job.program, "bench", job.uris[0], "--json", "--duration", f"{job.seconds}s", "--seed", str(job.seed),
               "--block-size", f"{cell.block_kib}K", "--depth", str(cell.depth), "--connections", str(cell.connections),
               *order, *share]
    done = run_client(command, job.seconds * 10 + 300)
    try:
        report = json.loads(done.stdout)
        sides = [report[side] for side in ("read", "write") if report[side]["requests"]]
        if report["errors"] or not sides:
            raise Failed(f"nbdbridge bench: {report['requests']} requests, errors {report['errors']}")
        slow = {name: max(side["latency_ns"][name] for side in sides) / 1e3 for name in ("p50", "p99", "p99_9")}
        return Outcome(
            rate=sum(side["iops"] if cell.unit == "IOPS" else side["bytes_per_second"] / 1e6 for side in sides),
            count=sum(side["requests"] for side in sides), cpu_seconds=done.cpu_seconds,
            p50_us=slow["p50"], p99_us=slow["p99"], p999_us=slow["p99_9"])
    except (ValueError, KeyError, TypeError) as error:
        raise Failed(f"nbdbridge bench: its report is not understood ({error!r})") from error


def nbdcopy(job):
    """Copies the whole image to nowhere, again and again until the time is over."""
    copies = cpu = 0
    began = time.monotonic()
    while copies == 0 or time.monotonic() - began < job.seconds:
        done = run_client(["nbdcopy", job.uris[0], "null:"], job.seconds * 10 + 300)
        copies, cpu = copies + 1, cpu + done.cpu_seconds
    wall = time.monotonic() - began
    copied_mib = copies * job.size_mib
    return Outcome(rate=copied_mib * (1 << 20) / 1e6 / wall, count=copied_mib, cpu_seconds=cpu)


CLIENTS = {
    "fio": Client("fio", "fio", lambda cell: cell.what != COPY, fio),
    "nbdcopy": Client("nbdcopy", "libnbd-bin", lambda cell: cell.what == COPY, nbdcopy),
    "nbdbridge": Client("", "", lambda cell: cell.what != COPY, nbdbridge, by_default=False),
}
