"""Where the images lie, and how they are made. A folder of ours holds them; it is gone when the run is over."""
import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile

from cells import FULL, SPARSE
from process import Failed

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Storage:
    title: str
    folder: str
    direct: bool


def storages(names, tmpfs_folder, disk_folder):
    """The storages by name; titles say what file system it really is."""
    disk = filesystem(disk_folder)
    known = {
        "tmpfs": Storage(filesystem(tmpfs_folder), tmpfs_folder, False),
        "disk": Storage(f"{disk} (page cache)", disk_folder, False),
        "direct": Storage(f"{disk} (O_DIRECT)", disk_folder, True),
    }
    return [known[name] for name in names]


def filesystem(folder):
    """The type of the file system of a folder."""
    folder, kind, longest = os.path.realpath(folder), "unknown file system", -1
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        mounted, this = line.split()[1:3]
        mounted = mounted.encode().decode("unicode_escape")
        inside = folder == mounted or folder.startswith(mounted.rstrip("/") + "/")
        # A later mount covers an earlier one at the same place.
        if inside and len(mounted) >= longest:
            kind, longest = this, len(mounted)
    return kind


@contextlib.contextmanager
def workplace(storage, size_mib, kinds, say):
    """A folder on the storage with an image of each kind: yields the folder and the paths."""
    free = shutil.disk_usage(storage.folder).free // MIB
    needed = 64 + sum(size_mib if kind == FULL else size_mib // 16 + 1 for kind in kinds)
    if free < needed:
        raise Failed(f"{storage.folder}: {free} MiB are free, {needed} are needed; take a smaller --size")
    with tempfile.TemporaryDirectory(dir=storage.folder, prefix="nbdbridge-bench-") as work:
        images = {}
        for kind in kinds:
            say(f"making a {kind} image of {size_mib} MiB on {storage.title} ({storage.folder})")
            images[kind] = f"{work}/{kind}.img"
            make_image(images[kind], size_mib, 16 if kind == SPARSE else 1)
        if storage.direct:
            need_direct(images[kinds[0]], storage)
        yield work, images


def make_image(path, size_mib, every=1):
    """An image with random bytes in one MiB of so many: zeroes and holes would be answered without being read."""
    with open(path, "wb") as image:
        for number in range(0, size_mib, every):
            image.seek(number * MIB)
            image.write(os.urandom(MIB))
        image.truncate(size_mib * MIB)
        os.fsync(image.fileno())


def need_direct(path, storage):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        raise Failed(f"{storage.folder}: no O_DIRECT there ({error.strerror}); take another --disk-folder") from error
