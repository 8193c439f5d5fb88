"""Makes a kernel module whose function ends its thread with an oops, as a kernel with a fault would.

    python3 tests/vm/oops.py ublk_drv.ko.xz ublk_ctrl_add_dev broken.ko

The function's first `push %r15` becomes `ud2`. The signature is cut off: Debian's kernels load a module without one,
but none with a wrong one.
"""

import lzma
import struct
import sys

SIGNATURE = b"~Module signature appended~\n"
PUSH_R15 = b"\x41\x57"
UD2 = b"\x0f\x0b"


def without_signature(module):
    if not module.endswith(SIGNATURE):
        return module
    at = len(module) - len(SIGNATURE)
    (length,) = struct.unpack(">I", module[at - 4 : at])
    return module[: at - 12 - length]


def place_of(module, name):
    """Returns where a function's bytes are in the file, and their number."""
    (table,) = struct.unpack_from("<Q", module, 40)
    size, count = struct.unpack_from("<HH", module, 58)
    # name, type, flags, address, offset, size, link, ...
    sections = [struct.unpack_from("<IIQQQQI", module, table + n * size) for n in range(count)]
    (_, _, _, _, symbols, length, link) = next(section for section in sections if section[1] == 2)
    texts = sections[link][4]
    for at in range(symbols, symbols + length, 24):
        text, kind, _, section, value, bytes_ = struct.unpack_from("<IBBHQQ", module, at)
        found = module[texts + text : module.index(b"\0", texts + text)].decode()
        if kind & 15 == 2 and (found == name or found.startswith(name + ".isra.")) and ".cold" not in found:
            return sections[section][4] + value, bytes_
    sys.exit(f"oops.py: no function {name}")


path, function, to = sys.argv[1:]
with (lzma.open(path) if path.endswith(".xz") else open(path, "rb")) as file:
    module = bytearray(without_signature(file.read()))
start, length = place_of(module, function)
# Behind the call of __fentry__, which the kernel writes over.
at = module.index(PUSH_R15, start, start + min(length, 32))
module[at : at + 2] = UD2
with open(to, "wb") as file:
    file.write(module)
