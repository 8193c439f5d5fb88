"""Suite `sources`: what a source costs that is no plain file: a qcow2 image beside qemu-nbd on the same one, and a remote
export beside other proxies, with the server that they ask as the mark. In turn (A B C, A B C).
"""
import contextlib
import subprocess

from cells import FULL, READ, WRITE, Cell
from net import measure, shown
from process import Failed
from record import CEILING, OURS, PEER, Record
from servers import Place, Server, Target, nbdbridge, nbdkit, new_place, running
from storage import storages, workplace

NAME = "sources"
HELP = "a qcow2 image, and a remote export"
START_SECONDS = 0.6  # what a run takes beside its time: a guess, for the forecast

CELLS = [Cell("4k read QD32", READ, 4, 32), Cell("4k write QD32", WRITE, 4, 32),
         Cell("4k read QD32 x4", READ, 4, 32, 4), Cell("1M read QD8", READ, 1024, 8, sequential=True)]


def qemu_nbd(form):
    def command(target, place):
        return ["qemu-nbd", "-f", form, "-t", "-e", "0", "-k", place.path, target.images[0]]
    return command


def nbdkit_nbd(target, place):
    return nbdkit(target, place, ["nbd", f"uri={target.images[0]}", "shared=true"])


QCOW2 = (Server("nbdbridge", OURS, "", (), nbdbridge), Server("qemu-nbd", PEER, "qemu-nbd", (), qemu_nbd("qcow2")))
PROXIES = (Server("nbdbridge", OURS, "", (), nbdbridge), Server("qemu-nbd", PEER, "qemu-nbd", (), qemu_nbd("raw")),
           Server("nbdkit nbd", PEER, "nbdkit", (), nbdkit_nbd))
DIRECT = Server("the server itself", CEILING, "", (), nbdbridge)


def tools(_settings):
    return [("fio", ("fio",)), ("nbdkit", ("nbdkit",)), ("qemu-nbd", ("qemu-utils",)), ("qemu-img", ("qemu-utils",))]


def forecast_seconds(settings):
    runs = len(CELLS) * (len(QCOW2) + len(PROXIES) + 1) * settings.rounds
    return runs * (settings.seconds + START_SECONDS)


def run(settings, records, say):
    # What the source costs shows where the storage costs least.
    for storage in storages(settings.storages[:1], settings.tmpfs_folder, settings.disk_folder):
        with workplace(storage, settings.size_mib, [FULL], say) as (work, images):
            image = f"{work}/disk.qcow2"
            convert(images[FULL], image)
            for number in range(1, settings.rounds + 1):
                for cell in CELLS:
                    title = f"{storage.title}, qcow2"
                    for server in QCOW2:
                        one(records, title, server, image, new_place("unix", work), cell, settings, number, say)
                    title = f"{storage.title}, remote export"
                    one(records, title, DIRECT, images[FULL], new_place("unix", work), cell, settings, number, say)
                    with asked(settings, images[FULL], f"{work}/upstream") as uri:
                        for server in PROXIES:
                            one(records, title, server, uri, new_place("unix", work), cell, settings, number, say)


def convert(raw, image):
    done = subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "preallocation=full", raw, image],
                          stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failed(f"suite {NAME}: {done.stderr.strip()}")


@contextlib.contextmanager
def asked(settings, image, path):
    """The server that the proxies ask."""
    place = Place(path=path)
    with running(DIRECT, Target(settings.program, (image,), settings.size_mib), place):
        yield place.uri()


def one(records, title, server, source, place, cell, settings, number, say):
    record = Record(NAME, title, cell.name, server.name, server.role, "fio", cell.unit, cell.per)
    measure(record, server, Target(settings.program, (source,), settings.size_mib), place, cell, settings, number)
    records.append(record)
    say(f"round {number} of {settings.rounds}: {title}: {cell.name}: {server.name}: {shown(record)}")
