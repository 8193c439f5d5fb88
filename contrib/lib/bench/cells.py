"""The cells: what a client does in one run. A cell says what, a client how."""
import dataclasses
import fnmatch

READ, WRITE, MIXED, COPY = "read", "write", "mixed", "copy"
FULL, SPARSE = "full", "sparse"


@dataclasses.dataclass(frozen=True)
class Cell:
    name: str
    what: str
    block_kib: int = 0
    depth: int = 0  # requests in flight on each connection
    connections: int = 1
    sequential: bool = False
    image: str = FULL
    headline: bool = False  # in the quick preset and in the chart

    @property
    def unit(self):
        """Of its rate: of large blocks and copies people ask for the throughput."""
        return "MB/s" if self.what == COPY or self.sequential else "IOPS"

    @property
    def per(self):
        """What its CPU time is divided by."""
        return "MiB" if self.what == COPY else "I/O"


def grid():
    headlines = {"4k read QD1", "4k read QD32", "4k write QD32", "4k read QD32 x4", "4k write QD32 x4", "64k read QD16",
                 "1M read QD8", "1M write QD8", "copy sparse", "copy full"}
    cells = []

    def add(name, *about, **more):
        cells.append(Cell(name, *about, headline=name in headlines, **more))

    for depth in (1, 32):
        for connections in (1, 4):
            for what in (READ, WRITE, MIXED):
                add(f"4k {what} QD{depth}" + many(connections), what, 4, depth, connections)
    for what in (READ, WRITE):
        add(f"64k {what} QD16", what, 64, 16)
    for connections in (1, 4):
        for what in (READ, WRITE):
            add(f"1M {what} QD8" + many(connections), what, 1024, 8, connections, sequential=True)
    for image in (SPARSE, FULL):
        add(f"copy {image}", COPY, image=image)
    return {cell.name: cell for cell in cells}


def many(connections):
    return f" x{connections}" if connections > 1 else ""


CELLS = grid()


def chosen(patterns):
    """Cells by shell patterns, in their own order; a pattern that fits none is a mistake."""
    for pattern in patterns:
        if not fnmatch.filter(CELLS, pattern):
            raise ValueError(f"no cell is called {pattern!r}; the cells are: {', '.join(CELLS)}")
    return [cell for name, cell in CELLS.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
