"""Direct reads and writes of a block device, in pieces of odd lengths at odd places of memory.

    python3 tests/vm/odd_io.py DEVICE SECONDS [zeroes]

Each request is a list of pieces whose lengths are multiples of the device's DMA alignment or of its logical block, and
whose sum is one of the block; the pieces lie at odd places of one buffer. What is written is read back and compared, or is zeroes where
the device keeps nothing. A program that takes the device's limits at their word (blktests' block/042: dio-offsets) needs
two buffers of half of max_segments times max_sectors_kb: the size is printed, with the memory that the machine has left.
"""

import mmap
import os
import random
import sys
import time

device, seconds, keeps = sys.argv[1], float(sys.argv[2]), sys.argv[3:] != ["zeroes"]
queue = "/sys/block/" + os.path.basename(device) + "/queue/"


def limit(name):
    with open(queue + name) as file:
        return int(file.read())


block, align = limit("logical_block_size"), limit("dma_alignment") + 1
largest, most = limit("max_sectors_kb") << 10, limit("max_segments")


def available():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) >> 10


print("segments %d, by the limits twice %d MiB, %d MiB of memory are available"
      % (most, largest * most // 2 >> 20, available()), flush=True)
# A device without a limit of its segments has 65535 of them.
room = min(largest * most // 2, 32 << 20)
written, read = mmap.mmap(-1, room), mmap.mmap(-1, room)
written.write(os.urandom(room))
disk = os.open(device, os.O_RDWR | os.O_DIRECT)
size = os.lseek(disk, 0, os.SEEK_END)
numbers = random.Random(42)
until, count, refused = time.monotonic() + seconds, 0, 0


def pieces(total, unit):
    """Returns offset and length of each piece, in one buffer of `room` bytes."""
    parts, at = [], numbers.randrange(0, 4096, align)
    while total > 0:
        length = min(total, numbers.randrange(unit, 16384, unit))
        parts.append((at, length))
        total -= length
        at += length + numbers.randrange(0, 64) * align
    return parts


def views(memory, parts):
    whole = memoryview(memory)
    return [whole[at : at + length] for at, length in parts]


def compare(at, length):
    wanted = written[at : at + length] if keeps else bytes(length)
    assert read[at : at + length] == wanted, (at, length)


def refused_of(vectors, at):
    """A request that is not to be taken, and hurts nothing."""
    try:
        os.preadv(disk, vectors, at)
    except OSError as error:
        assert error.errno == 22, error
    else:
        sys.exit("an odd request was taken: at %d, %s" % (at, [len(one) for one in vectors]))


# One request of all of it, which the kernel splits, from the begin of a page and from an odd place.
for skip in (0, align, block + align):
    length = min(room, size) - 2 * block
    assert os.pwritev(disk, views(written, [(skip, length)]), 0) == length
    assert os.preadv(disk, views(read, [(skip, length)]), 0) == length
    compare(skip, length)
# Whole blocks at places that no device takes, and memory that ends within a block.
if align > 1:
    refused_of(views(read, [(1, block)]), 0)
refused_of(views(read, [(0, block + align)]), 0)
# More pieces than a request may have.
vectors = [(n * 4096 + 4096 - block, block) for n in range(1000)]
assert os.pwritev(disk, views(written, vectors), 0) == 1000 * block
assert os.preadv(disk, views(read, vectors), 0) == 1000 * block
for at, length in vectors:
    compare(at, length)
least = available()

while time.monotonic() < until:
    total = numbers.randrange(block, 1 << 20, block)
    offset = numbers.randrange(0, size - total, block)
    # Before Linux 6.18 each piece is of whole blocks.
    parts = pieces(total, numbers.choice((align, block)))
    try:
        assert os.pwritev(disk, views(written, parts), offset) == total
        assert os.preadv(disk, views(read, parts), offset) == total
    except OSError as error:
        # Pieces that no request can hold (EINVAL) are the block layer's to refuse.
        if error.errno != 22:
            raise
        refused += 1
        continue
    for at, length in parts:
        compare(at, length)
    count += 1
    least = min(least, available())
    if count % 16 == 0:
        refused_of([memoryview(read)[:total]], offset + 1)
        refused_of([memoryview(read)[: total + 1]], offset)
print("requests %d, refused %d, least available %d MiB" % (count, refused, least))
assert count > 10
