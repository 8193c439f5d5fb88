"""What a suite measures: one Record for each run; and medians over the rounds. Knows no suite and no program."""
import dataclasses
import statistics

OURS, PEER, CEILING = "ours", "peer", "ceiling"


@dataclasses.dataclass
class Record:
    """One run of one contestant. What does not apply is None; where it failed, `error` says how."""
    suite: str
    section: str  # what a table is about: "tmpfs, Unix socket"
    cell: str
    contestant: str
    role: str  # OURS, PEER, or CEILING: a mark that nobody has to beat
    client: str = ""
    unit: str = "IOPS"  # of `rate`: IOPS or MB/s (10^6 bytes)
    per: str = "I/O"  # what the CPU times are divided by
    rate: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    p999_us: float | None = None
    server_cpu_us: float | None = None
    total_cpu_us: float | None = None  # client and server
    peak_kib: float | None = None  # resident memory of the server at its highest
    each_kib: float | None = None  # memory that one more connection or export takes
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column, and which way is better."""
    field: str
    title: str
    more_is_better: bool = False


RATE = Metric("rate", "rate", more_is_better=True)
SERVER_CPU = Metric("server_cpu_us", "CPU of the server")
TOTAL_CPU = Metric("total_cpu_us", "CPU of client and server")
P50 = Metric("p50_us", "p50 latency")
P99 = Metric("p99_us", "p99 latency")
P999 = Metric("p999_us", "p99.9 latency")
PEAK = Metric("peak_kib", "peak memory")
EACH = Metric("each_kib", "memory each")
METRICS = (RATE, P50, P99, P999, SERVER_CPU, TOTAL_CPU, PEAK, EACH)


def medians(records):
    """One Record of medians for each contestant of each cell, in the order of the first round.

    A contestant that failed in any round has failed: a median of the rounds that went well would hide it.
    """
    runs = {}
    for record in records:
        key = (record.suite, record.section, record.cell, record.client, record.contestant)
        runs.setdefault(key, []).append(record)
    result = []
    for rounds in runs.values():
        middle = dataclasses.replace(rounds[0])
        middle.error = next((run.error for run in rounds if run.error), None)
        for metric in METRICS:
            values = [getattr(run, metric.field) for run in rounds]
            known = [value for value in values if value is not None]
            setattr(middle, metric.field, statistics.median(known) if known and not middle.error else None)
        result.append(middle)
    return result


def grouped(records, *fields):
    """Records by the values of the given fields, in order of appearance."""
    groups = {}
    for record in records:
        groups.setdefault(tuple(getattr(record, field) for field in fields), []).append(record)
    return groups


def best(records, metric):
    """The peer that is best by a metric, or None where no peer has it."""
    peers = [record for record in records if record.role == PEER and getattr(record, metric.field)]
    if not peers:
        return None
    choose = max if metric.more_is_better else min
    return choose(peers, key=lambda record: getattr(record, metric.field))


def ours_of(records):
    """Our own record of a cell, or None where it was not measured."""
    return next((record for record in records if record.role == OURS), None)


def ratio(ours, peer, metric):
    """Ours divided by a peer's, or None where one of them is not known."""
    if ours is None or peer is None:
        return None
    mine, theirs = getattr(ours, metric.field), getattr(peer, metric.field)
    return mine / theirs if mine is not None and theirs else None
