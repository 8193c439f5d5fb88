"""Partition tables as few tools make them: disks of other systems, damaged ones, and random ones from a seed.

`cases(seed)` gives (name, size of a sector, bytes of the disk). Each sector of 512 bytes that no table is in holds its own number.
"""

import random
import struct
import zlib

KIB, MIB = 1 << 10, 1 << 20
LINUX = bytes.fromhex("af3dc60f838472478e793d69d8477de4")
EXTENDED = 0x05


class Disk:
    def __init__(self, size=4 * MIB, sector=512):
        self.sector = sector
        self.bytes = bytearray(b"".join(struct.pack("<Q", n) * 64 for n in range(size // 512)))
        self.last = size // sector - 1
        self.put(0, bytes(512))

    def put(self, at, data):
        self.bytes[at : at + len(data)] = data

    def record(self, lba, *entries):
        """A boot record. Entries are (slot, type, start, length) in sectors."""
        at = lba * self.sector
        self.put(at, bytes(512))
        for slot, kind, start, length in entries:
            self.put(at + 446 + 16 * slot, struct.pack("<8xII", start, length))
            self.bytes[at + 446 + 16 * slot + 4] = kind
        self.put(at + 510, b"\x55\xaa")
        return self

    def protect(self, *others, start=1):
        return self.record(0, (0, 0xEE, start, 0xFFFFFFFF), *others)

    def gpt(self, entries, count=128, copy=True, usable=None):
        """A table of (number, first sector, last sector), with the copy at the end."""
        room = -(-count * 128 // self.sector)
        table = bytearray(count * 128)
        for number, first, last in entries:
            guid = struct.pack(">QQ", number, first + 1)
            name = f"part {number}".encode("utf-16-le")
            entry = LINUX + guid + struct.pack("<QQQ", first, last, 0) + name
            table[(number - 1) * 128 : (number - 1) * 128 + len(entry)] = entry
        first, last = usable or (2 + room, self.last - room - 1)
        places = [(1, self.last, 2)] + [(self.last, 1, self.last - room)] * copy
        for here, there, at in places:
            head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, here, there, first, last,
                               bytes(range(16)), at, count, 128, zlib.crc32(table))
            head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
            self.put(here * self.sector, head.ljust(self.sector, b"\0"))
            self.put(at * self.sector, bytes(table).ljust(room * self.sector, b"\0"))
        return self

    def wipe(self, lba, sectors=1):
        self.put(lba * self.sector, bytes(sectors * self.sector))
        return self

    def cut(self, size):
        del self.bytes[size:]
        return self


def logical(sector=512):
    """Two primary partitions and two logical ones."""
    disk = Disk(16 * MIB if sector > 512 else 4 * MIB, sector)
    disk.record(0, (0, 0x83, 8, 100), (2, 0x0C, 200, 300), (3, EXTENDED, 1000, 3000))
    disk.record(1000, (0, 0x83, 8, 90), (1, EXTENDED, 500, 600))
    return disk.record(1500, (0, 0x83, 16, 64))


def boot_records():
    yield "logical", logical()
    for sector in (1024, 2048, 4096):
        yield f"logical-{sector}", logical(sector)
    yield "no-table", Disk()
    yield "empty", Disk().record(0)
    # A file system whose code is where the entries would be.
    fat = Disk().record(0, (0, 0x83, 8, 100))
    fat.bytes[446] = 0x41
    yield "boot-code", fat
    yield "empty-first-record", logical().record(1000, (1, EXTENDED, 500, 600))
    yield "no-first-record", logical().wipe(1000)
    yield "link-before-data", logical().record(1000, (0, EXTENDED, 500, 600), (1, 0x83, 8, 90))
    yield "four-in-a-record", logical().record(1500, (0, 0x83, 16, 64), (1, 0x83, 100, 50), (2, 0x83, 10000, 50),
                                               (3, 0x83, 200, 50))
    yield "isohybrid", Disk().record(0, (0, 0, 0, 6000), (1, 0xEF, 100, 800))
    yield "two-extended", logical().record(0, (0, 0x83, 8, 100), (1, 0x0F, 600, 100), (2, 0x0C, 200, 300),
                                           (3, EXTENDED, 1000, 3000)).record(600, (0, 0x83, 2, 3))
    yield "extended-without-records", Disk().record(0, (0, EXTENDED, 1000, 3000), (1, 0x83, 8, 100))
    yield "cut-before-extended", logical().cut(900 * 512)
    yield "cut-in-the-chain", logical().cut(1400 * 512)
    yield "cut-in-a-logical", logical().cut(1540 * 512)
    yield "cut-in-a-primary", logical().cut(300 * 512)
    yield "chain-past-the-end", logical().record(1500, (0, 0x83, 16, 64), (1, EXTENDED, 0xFFFFFF00, 600))
    yield "overlapping", Disk().record(0, (0, 0x83, 8, 4000), (1, 0x83, 100, 200), (2, 0x83, 8, 4000))


def guid_tables():
    some = [(1, 64, 127), (5, 128, 128)]
    for sector in (512, 1024, 2048, 4096):
        yield f"gpt-{sector}", Disk(sector=sector).protect().gpt(some)
    yield "gpt-without-copy", Disk().protect().gpt(some, copy=False)
    # As where an image was copied by the length of its partitions.
    yield "gpt-cut-to-its-copy", Disk().protect().gpt(some).cut(4 * MIB - 33 * 512)
    yield "gpt-cut-further", Disk().protect().gpt(some + [(6, 4000, 5000)]).cut(2 * MIB)
    yield "gpt-longer-disk", Disk().protect().gpt(some, usable=(34, 4000))
    yield "gpt-without-first", Disk().protect().gpt(some).wipe(1)
    many = [(n, 1000 + n, 1000 + n) for n in (1, 2, 200, 255, 256, 2047, 2048)]
    yield "gpt-2048-entries", Disk().protect().gpt(many, count=2048)
    yield "gpt-4-entries", Disk().protect().gpt([(4, 64, 127)], count=4)
    yield "gpt-hybrid", Disk().protect((1, 0x83, 64, 64), (2, 0x0C, 128, 1)).gpt(some)
    hybrid = Disk().record(0, (0, 0x0C, 128, 1), (1, 0x83, 64, 64), (3, 0xEE, 1, 63)).gpt(some)
    yield "gpt-hybrid-last", hybrid
    yield "gpt-protected-elsewhere", Disk().protect(start=63).gpt(some)
    yield "gpt-unprotected", Disk().record(0, (0, 0x83, 64, 64)).gpt(some)
    yield "gpt-protection-only", Disk().protect()
    yield "gpt-past-the-end", Disk().protect().gpt(some + [(2, 200, 9000), (3, 9000, 9100)])


def random_records(seed):
    """Chains of boot records with random entries and links, of which most make some sense."""
    numbers = random.Random(seed)
    for n in range(8):
        disk = Disk(sector=numbers.choice((512, 512, 512, 2048)), size=8 * MIB)
        kinds = (0x83, 0x83, 0x82, 0x0C, 0x00, 0x07)

        def entries(base, most, links):
            slots = numbers.sample(range(4), numbers.randint(1, 4))
            for slot in slots:
                link = numbers.random() < links
                kind = numbers.choice((0x05, 0x0F, 0x85)) if link else numbers.choice(kinds)
                yield slot, kind, numbers.randint(1, most), numbers.choice((0, 1, 7, numbers.randint(8, most)))

        top = list(entries(0, disk.last, 0.4))
        disk.record(0, *top)
        for _, kind, start, length in top:
            if kind not in (0x05, 0x0F, 0x85) or length == 0:
                continue
            here = start
            # The links of a chain lead forwards: one that leads back is a case of its own.
            while here <= disk.last:
                room = disk.last - here
                found = [(s, k, o, l) for s, k, o, l in entries(here, max(room, 8), 0.3)]
                links = [e for e in found if e[1] in (0x05, 0x0F, 0x85) and e[3] > 0]
                onward = here - start + numbers.randint(1, max(room, 2))
                found = [(s, k, onward, l) if (s, k, o, l) in links else (s, k, o, l) for s, k, o, l in found]
                disk.record(here, *found)
                if not links:
                    break
                here = start + onward
        yield f"random-{n}", disk


def cases(seed):
    for make in (boot_records, guid_tables, lambda: random_records(seed)):
        for name, disk in make():
            yield name, disk.sector, bytes(disk.bytes)
