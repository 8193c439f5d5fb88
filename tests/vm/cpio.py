"""Writes an initramfs (a newc archive) to stdout: the files of a folder, and others beside them at the top.

    cpio.py FOLDER FILE...

Everything belongs to root; /dev/console is added, for init's first words.
"""
import os
import stat
import sys


def entry(out, number, name, mode, data=b"", device=(0, 0)):
    fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0]
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    out.write(header + b"\0" * (-len(header) % 4) + data + b"\0" * (-len(data) % 4))


def main(folder, *files):
    out = sys.stdout.buffer
    found = {}
    for path, folders, names in os.walk(folder):
        for name in folders + names:
            full = os.path.join(path, name)
            found[os.path.relpath(full, folder)] = full
    found.update((os.path.basename(path), path) for path in files)
    for number, (name, path) in enumerate(sorted(found.items()), 1):
        mode = os.lstat(path).st_mode
        data = b"" if stat.S_ISDIR(mode) else open(path, "rb").read()
        entry(out, number, name, stat.S_IFMT(mode) | 0o755, data)
    entry(out, len(found) + 1, "dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    entry(out, 0, "TRAILER!!!", 0)


main(*sys.argv[1:])
