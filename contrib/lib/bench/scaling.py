"""Suite `scaling`: what one I/O costs a server as its connections and exports become many, and the memory they take.

Connections: all are busy, 4k random reads at QD1, by a small client of our own whose rate is no measure of the server;
memory is that of one more connection that is open and does nothing. Exports: fio with four connections, each on an
export of its own, 4k random reads at QD8; memory is that of one more export that nobody uses.
"""
import contextlib
import dataclasses
import os
import time

import nbd
from cells import READ, Cell
from clients import Job, Outcome, fio
from net import chosen, failing_into, fill, shown
from process import allow_descriptors
from record import Record
from servers import Target, new_place, running
from storage import MIB, make_image, storages, workplace

NAME = "scaling"
HELP = "cost and memory against the number of connections and exports"
CONNECTIONS, EXPORTS = "connections", "exports"
START_SECONDS = 1.5  # what a run takes beside its time: a guess, for the forecast
BUSY_EXPORTS = 4


def tools(settings):
    return [(server.tool, server.packages) for server in chosen(settings) if server.tool] + [("fio", ("fio",))]


def forecast_seconds(settings):
    return len(settings.points) * 2 * len(settings.servers) * settings.rounds * (settings.seconds + START_SECONDS)


def run(settings, records, say):
    allow_descriptors(2 * max(settings.points) + 1024)
    storage = storages(["tmpfs"], settings.tmpfs_folder, settings.disk_folder)[0]
    with workplace(storage, settings.size_mib, ["full"], say) as (work, images):
        for number in range(1, settings.rounds + 1):
            for point in settings.points:
                for server in chosen(settings):
                    record = new_record(CONNECTIONS, storage, point, server)
                    with failing_into(record):
                        target = Target(settings.program, (images["full"],), settings.size_mib)
                        connections(record, server, target, work, point, settings.seconds, number)
                    finish(record, records, number, settings, say)
    for number in range(1, settings.rounds + 1):
        for point in settings.points:
            size_mib = max(1, settings.size_mib // point)
            with workplace(storage, size_mib, [], say) as (work, _):
                images = tuple(f"{work}/exports/e{index}" for index in range(point))
                os.mkdir(f"{work}/exports")
                for path in images:
                    make_image(path, size_mib)
                for server in chosen(settings):
                    if not server.many:
                        continue
                    record = new_record(EXPORTS, storage, point, server)
                    with failing_into(record):
                        target = Target(settings.program, images, size_mib)
                        exports(record, server, target, work, settings.seconds, number)
                    finish(record, records, number, settings, say)


def new_record(what, storage, point, server):
    cell = f"{point} {what if point > 1 else what[:-1]}"
    return Record(NAME, f"{what}, {storage.title}, Unix socket", cell, server.name, server.role,
                  "fio" if what == EXPORTS else "own")


def finish(record, records, number, settings, say):
    records.append(record)
    say(f"round {number} of {settings.rounds}: {record.section}: {record.cell}: {record.contestant}: {shown(record)}")


def connections(record, server, target, work, count, run_seconds, seed):
    """Memory while all are idle, then the cost while all are busy."""
    with running(server, target, place := new_place("unix", work)) as up, contextlib.ExitStack() as held:
        # The first one brings in what all share.
        socks = [held.enter_context(nbd.open_export(place))]
        before = up.memory_kib("VmRSS")
        socks += [held.enter_context(nbd.open_export(place)) for _ in range(count - 1)]
        if count > 1:
            record.each_kib = (up.memory_kib("VmRSS") - before) / (count - 1)
        own = time.process_time()
        reads, wall, used = nbd.keep_reading(socks, target.size_mib * MIB, run_seconds, seed, up.cpu_seconds)
        outcome = Outcome(rate=reads / wall, count=reads, cpu_seconds=time.process_time() - own)
        fill(record, outcome, used, up.memory_kib("VmHWM"))


def exports(record, server, target, work, run_seconds, seed):
    count = len(target.images)
    names = [os.path.basename(path) for path in target.images] if count > 1 else [""]
    busy = sorted({names[index * count // BUSY_EXPORTS] for index in range(BUSY_EXPORTS)})
    cell = Cell(record.cell, READ, block_kib=4, depth=8, connections=BUSY_EXPORTS)
    with running(server, dataclasses.replace(target, images=target.images[:1]), new_place("unix", work)) as up:
        alone = up.memory_kib("VmRSS")
    with running(server, target, place := new_place("unix", work)) as up:
        if count > 1:
            record.each_kib = (up.memory_kib("VmRSS") - alone) / (count - 1)
        before = up.cpu_seconds()
        outcome = fio(Job(cell, [place.uri(name) for name in busy], target.size_mib, run_seconds, seed,
                          target.program))
        fill(record, outcome, up.cpu_seconds() - before, up.memory_kib("VmHWM"))
