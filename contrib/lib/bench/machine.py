"""What a run needs of its machine: programs installed, nbdbridge built; and what a reader has to know of it."""
import datetime
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

from process import Failed

ROOT = pathlib.Path(__file__).resolve().parents[3]
BUSY_LOAD = 0.5


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def install(tools):
    """Installs what is missing by apt, as contrib/test does, as far as apt has it."""
    by_tool = dict(tools)
    for choice in range(max((len(packages) for packages in by_tool.values()), default=0)):
        missing = [f"{tool}:{packages[choice]}" for tool, packages in by_tool.items()
                   if not shutil.which(tool) and choice < len(packages)]
        if missing:
            shell(["install_missing", *missing])


def need(tools):
    """Ends the run where a program is not there."""
    for tool, packages in tools:
        if not shutil.which(tool):
            package = " or ".join(packages)
            raise Failed(f"no {tool} here (Debian package {package}); --server and --client choose others")


def build():
    """Builds the release program, with cargo as contrib/test finds it."""
    say("building the release program")
    shell(["eval", "need_cargo && cargo build --release --locked --quiet"])
    target = os.environ.get("CARGO_TARGET_DIR", "target")
    return str(ROOT / target / "release/nbdbridge")


def shell(words):
    """Runs a function of contrib/lib/common.sh."""
    script = 'set -e; . contrib/lib/common.sh; "$@"'
    done = subprocess.run(["bash", "-c", script, "contrib/bench", *words], cwd=ROOT, stdout=sys.stderr)
    if done.returncode != 0:
        raise Failed(f"{' '.join(words)}: status {done.returncode}")


def first_line(command):
    """The first line of a program's output, usually its version."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{command[0]}: {error}") from error
    lines = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode != 0 or not lines:
        raise Failed(f"{' '.join(command)}: status {done.returncode}: {lines[-1] if lines else 'it said nothing'}")
    return lines[0]


def header(program, tools, settings):
    """Date, machine, versions and settings, in the order in which they are shown."""
    versions = [version(tool) for tool in dict(tools)]
    ours = f"{first_line([program, '--version'])} ({commit()})"
    load = os.getloadavg()[0]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.1f} GiB",
        "load before": f"{load:.2f}" + (" (others were at work: the figures are not to be trusted)"
                                        if load > BUSY_LOAD else ""),
        "versions": "; ".join([ours, *versions]),
        "runs": runs_of(settings),
    }


def commit():
    """Of the tree that this script lies in."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "no git"
    return done.stdout.strip() or "no git"


def runs_of(settings):
    rounds = f"medians of {settings.rounds} rounds" if settings.rounds > 1 else "one round"
    return f"{rounds} of {settings.seconds} s; a {settings.size_mib} MiB image"


def version(tool):
    """"qemu-nbd 10.0.2 (Debian 1:10.0.2+ds-2)" without what the distribution says."""
    try:
        line = first_line([tool, "--version"])
    except Failed:
        return f"{tool} of unknown version"
    return re.sub(r"\s*\(.*", "", line).replace(" version ", " ").replace("fio-", "fio ")


def cpu_model():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
