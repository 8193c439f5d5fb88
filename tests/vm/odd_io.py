"""Direct reads and writes of a block device, in pieces of odd lengths at odd places of memory.

    python3 tests/vm/odd_io.py DEVICE SECONDS

Each request is a list of pieces whose lengths are multiples of the device's DMA alignment, and whose sum is one of the
logical block; the pieces lie at odd places of one buffer. What is written is read back and compared. A program that
takes the device's limits at their word needs a buffer of half of max_segments times max_sectors_kb: the size is printed.
"""

import mmap
import os
import random
import sys
import time

device, seconds = sys.argv[1], float(sys.argv[2])
queue = "/sys/block/" + os.path.basename(device) + "/queue/"


def limit(name):
    with open(queue + name) as file:
        return int(file.read())


block, align = limit("logical_block_size"), limit("dma_alignment") + 1
largest, most = limit("max_sectors_kb") << 10, limit("max_segments")
print("segments %d, bytes by the limits %d" % (most, largest * most // 2), flush=True)
room = 8 << 20
written, read = mmap.mmap(-1, room), mmap.mmap(-1, room)
written.write(os.urandom(room))
disk = os.open(device, os.O_RDWR | os.O_DIRECT)
size = os.lseek(disk, 0, os.SEEK_END)
numbers = random.Random(42)
until, count, refused = time.monotonic() + seconds, 0, 0


def pieces(total):
    """Returns offset and length of each piece, in one buffer of `room` bytes."""
    parts, at = [], numbers.randrange(0, 4096, align)
    while total > 0:
        length = min(total, numbers.randrange(align, 16384, align))
        parts.append((at, length))
        total -= length
        at += length + numbers.randrange(0, 64) * align
    return parts


def views(memory, parts):
    whole = memoryview(memory)
    return [whole[at : at + length] for at, length in parts]


while time.monotonic() < until:
    total = numbers.randrange(block, 1 << 20, block)
    offset = numbers.randrange(0, size - total, block)
    parts = pieces(total)
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
        assert written[at : at + length] == read[at : at + length], (offset, at, length)
    count += 1
    # A length or an offset that is no multiple of the block is refused, and hurts nothing.
    if count % 16 == 0:
        for bad in ((offset + 1, total), (offset, total + 1)):
            try:
                os.preadv(disk, [memoryview(read)[: bad[1]]], bad[0])
            except OSError as error:
                assert error.errno == 22, error
            else:
                sys.exit("an odd request was taken: %s" % (bad,))
print("requests %d, refused %d" % (count, refused))
assert count > 0
