"""The command line of contrib/bench: which suites run, with what settings, and where the figures go."""
import argparse
import pathlib
import shutil
import sys

import cells
import chart
import fuse
import machine
import net
import process
import report
import scaling
import sources
import vm
from clients import CLIENTS
from machine import say
from servers import SERVERS

DESCRIPTION = """\
contrib/bench - measures nbdbridge beside its peers, on the same image, in turn, in one run.

  contrib/bench --quick     the headline cells, in less than three minutes
  contrib/bench             everything: about an hour
  contrib/bench --scaling   cost and memory against connections and exports, 1 to 1000
  contrib/bench --fuse      FUSE files
  contrib/bench --vm        kernel devices, in the test VM

Installs what is missing by apt, builds the release program, and leaves nothing behind. Each cell is run once per server
and round, in turn (A B C, A B C), with a server started afresh; medians are shown. Everybody runs with default options.
Exit status 0: every run went well; 1: some failed, and are named; 130: interrupted."""

# A suite is a module with NAME and HELP; tools(settings): what has to be installed; forecast_seconds(settings); and
# run(settings, records, say), which appends a Record for each run. Tables, chart and JSON need no more than that.
SUITES = {suite.NAME: suite for suite in (net, scaling, fuse, sources, vm)}

PRESETS = {
    "quick": {"rounds": 1, "seconds": 1, "size_mib": 256, "storages": ["tmpfs", "disk"], "transports": ["unix"],
              "cells": [name for name, cell in cells.CELLS.items() if cell.headline], "points": [1, 100, 1000],
              "kernels": ["6.12"]},
    "full": {"rounds": 3, "seconds": 2, "size_mib": 1024, "storages": ["tmpfs", "disk", "direct"],
             "transports": ["unix", "tcp"], "cells": list(cells.CELLS), "points": [1, 10, 100, 1000],
             "kernels": ["6.12", "new"]},
}


def options():
    parser = argparse.ArgumentParser(prog="contrib/bench", description=DESCRIPTION,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    full, quick = PRESETS["full"], PRESETS["quick"]

    def choice(flag, field, help_text, **more):
        parser.add_argument(flag, dest=field, action="append", help=f"{help_text}; repeatable", **more)

    parser.add_argument("--quick", action="store_true", help="few cells, one round, small image")
    choice("--suite", "suites", "what to measure [default: net]", choices=SUITES)
    for name, suite in SUITES.items():
        parser.add_argument(f"--{name}", dest="suites", action="append_const", const=name,
                            help=f"--suite {name}: {suite.HELP}")
    for flag, field, metavar, help_text in (
            ("--rounds", "rounds", "N", "runs of each cell and server"),
            ("--seconds", "seconds", "N", "length of each run"),
            ("--size", "size_mib", "MIB", "size of the image")):
        parser.add_argument(flag, dest=field, type=positive, metavar=metavar,
                            help=f"{help_text} [default: {full[field]}; --quick: {quick[field]}]")
    choice("--cell", "cells", "only these, by shell pattern, as '4k*'", metavar="PATTERN")
    choice("--storage", "storages", "only this one", choices=full["storages"])
    choice("--transport", "transports", "only this one", choices=full["transports"])
    choice("--server", "servers", "only this one", choices=SERVERS)
    choice("--client", "clients", "only this one", choices=CLIENTS)
    choice("--point", "points", "with --scaling: so many connections and exports", type=positive, metavar="N")
    choice("--kernel", "kernels", "with --vm: only this one", choices=full["kernels"])
    parser.add_argument("--every-transport", action="store_true", help="TCP on every storage, not only on the first")
    parser.add_argument("--tmpfs-folder", default="/dev/shm", metavar="FOLDER", help="[default: /dev/shm]")
    parser.add_argument("--disk-folder", default="/var/tmp", metavar="FOLDER", help="[default: /var/tmp]")
    parser.add_argument("--program", metavar="FILE",
                        help="the nbdbridge to measure [default: builds the release program]")
    parser.add_argument("--no-apt", action="store_true", help="install nothing")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", metavar="FILE", help="write tables for a README there")
    parser.add_argument("--svg", metavar="FILE", help="draw the headline cells of the first storage there")
    return parser


def positive(word):
    number = int(word)
    if number < 1:
        raise ValueError(word)
    return number


def settings_from(parser, words):
    """The options, with the preset's values where none were given."""
    settings = parser.parse_args(words)
    for field, value in PRESETS["quick" if settings.quick else "full"].items():
        if getattr(settings, field) is None:
            setattr(settings, field, value)
    settings.suites = list(dict.fromkeys(settings.suites or ["net"]))
    settings.peers_chosen = bool(settings.servers)
    settings.servers = settings.servers or list(SERVERS)
    settings.clients = settings.clients or [name for name, client in CLIENTS.items() if client.by_default]
    try:
        settings.cells = cells.chosen(settings.cells)
    except ValueError as error:
        parser.error(str(error))
    for field in ("json", "markdown", "svg"):
        path = getattr(settings, field)
        # An hour later would be late to hear of it.
        if path and not pathlib.Path(path).resolve().parent.is_dir():
            parser.error(f"--{field} {path}: there is no such folder")
    return settings


def write(settings, header, records):
    """The files that were asked for, and the tables on the screen."""
    files = ((settings.json, report.as_json), (settings.markdown, report.markdown), (settings.svg, chart.svg))
    for path, make in files:
        if path:
            pathlib.Path(path).write_text(make(header, records))
            say(f"wrote {path}")
    print("\n" + report.terminal(header, records))


def tools_of(suites, settings):
    """What the suites need, each once: pairs of a command and the packages that may have it."""
    return list(dict.fromkeys(tool for suite in suites for tool in suite.tools(settings)))


def leave_out_absent(settings):
    """Peers that cannot be had here are left out, aloud, unless they were asked for by name; which these are."""
    if settings.peers_chosen:
        return []
    absent = [name for name in settings.servers if SERVERS[name].tool and not shutil.which(SERVERS[name].tool)]
    settings.servers = [name for name in settings.servers if name not in absent]
    for name in absent:
        say(f"leaving out {name}: it is not installed")
    return absent


def run(settings):
    suites = [SUITES[name] for name in settings.suites]
    linker = [] if settings.program else [("cc", ("gcc",))]
    if not settings.no_apt:
        machine.install(tools_of(suites, settings) + linker)
    absent = leave_out_absent(settings)
    tools = tools_of(suites, settings)
    machine.need(tools + linker)
    settings.program = str(pathlib.Path(settings.program).resolve()) if settings.program else machine.build()
    header = machine.header(settings.program, tools, settings) | ({"left out": ", ".join(absent)} if absent else {})
    say(f"this takes about {sum(suite.forecast_seconds(settings) for suite in suites) / 60:.0f} min")
    records, interrupted = [], False
    try:
        for suite in suites:
            suite.run(settings, records, say)
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted; what was measured until now:")
    if records:
        write(settings, header, records)
    return 130 if interrupted else 1 if not records or any(record.error for record in records) else 0


def main():
    process.interrupts_raise()
    settings = settings_from(options(), sys.argv[1:])
    try:
        return run(settings)
    except process.Failed as error:
        say(error)
    except OSError as error:
        say(f"{error.filename or 'bench'}: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
