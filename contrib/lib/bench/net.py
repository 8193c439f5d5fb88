"""Suite `net`: the NBD servers side by side, on one image, in turn (A B C A B C): a noisy machine is noisy to all."""
import contextlib

from cells import COPY, FULL
from clients import CLIENTS, Job
from process import Failed
from record import CEILING, Record
from servers import SERVERS, Target, new_place, running
from storage import storages, workplace

NAME = "net"
HELP = "NBD servers side by side"
TRANSPORTS = {"unix": "Unix socket", "tcp": "TCP"}
START_SECONDS = 0.6  # what a run takes beside its time: a guess, for the forecast


def tools(settings):
    """What has to be installed: pairs of a command and the packages that may have it."""
    return ([(server.tool, server.packages) for server in chosen(settings) if server.tool] +
            [(CLIENTS[name].tool, (CLIENTS[name].package,)) for name in settings.clients if CLIENTS[name].tool])


def chosen(settings):
    return [SERVERS[name] for name in settings.servers]


def sections(settings):
    """Pairs of a storage and a transport. The storage changes nothing about a socket: where both are measured, TCP is
    on the first storage alone, unless all are asked for."""
    pairs = []
    for number, storage in enumerate(storages(settings.storages, settings.tmpfs_folder, settings.disk_folder)):
        for transport in settings.transports:
            if transport == "unix" or number == 0 or settings.every_transport or "unix" not in settings.transports:
                pairs.append((storage, transport))
    return pairs


def pairings(settings):
    """Each cell with each of the chosen clients that can run it."""
    return [(cell, name) for cell in settings.cells for name in settings.clients if CLIENTS[name].suits(cell)]


def forecast_seconds(settings):
    runs = len(sections(settings)) * len(pairings(settings)) * len(settings.servers) * settings.rounds
    return runs * (settings.seconds + START_SECONDS)


def run(settings, records, say):
    """Runs everything that is chosen, and appends a record for each run."""
    pairs = pairings(settings)
    kinds = list(dict.fromkeys(cell.image for cell, _ in pairs)) or [FULL]
    for storage in dict.fromkeys(storage for storage, _ in sections(settings)):
        with workplace(storage, settings.size_mib, kinds, say) as (work, images):
            for transport in [way for place, way in sections(settings) if place == storage]:
                title = f"{storage.title}, {TRANSPORTS[transport]}"
                for number in range(1, settings.rounds + 1):
                    for cell, client in pairs:
                        for server in chosen(settings):
                            if server.role == CEILING and cell.what == COPY and cell.image != FULL:
                                continue  # no storage, no holes: a copy of them says nothing
                            record = Record(NAME, title, cell.name, server.name, server.role, client, cell.unit,
                                            cell.per)
                            target = Target(settings.program, (images[cell.image],), settings.size_mib,
                                            storage.direct, every_extent=cell.what == COPY)
                            measure(record, server, target, new_place(transport, work), cell, settings, number)
                            records.append(record)
                            say(f"round {number} of {settings.rounds}: {title}: {cell.name}: {server.name}: "
                                + shown(record))


def shown(record):
    return f"FAILED: {record.error}" if record.error else f"{record.rate:,.0f} {record.unit}"


def measure(record, server, target, place, cell, settings, seed):
    """One run of one server: fills in the record."""
    with failing_into(record), running(server, target, place) as up:
        before = up.cpu_seconds()
        job = Job(cell, [place.uri()], target.size_mib, settings.seconds, seed, target.program)
        outcome = CLIENTS[record.client].run(job)
        fill(record, outcome, up.cpu_seconds() - before, up.memory_kib("VmHWM"))


@contextlib.contextmanager
def failing_into(record):
    """What fails inside is that run's outcome, and no more than that."""
    try:
        yield
    except (Failed, OSError) as error:
        record.error = str(error)


def fill(record, outcome, server_cpu_seconds, peak_kib):
    record.rate, record.peak_kib = outcome.rate, peak_kib
    record.p50_us, record.p99_us, record.p999_us = outcome.p50_us, outcome.p99_us, outcome.p999_us
    record.server_cpu_us = server_cpu_seconds / outcome.count * 1e6
    record.total_cpu_us = (server_cpu_seconds + outcome.cpu_seconds) / outcome.count * 1e6
