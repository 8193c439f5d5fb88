"""Child processes: started apart from the terminal's signals, always ended, their CPU time and memory read.

CPU time comes from the clock that POSIX gives every process (clock_getcpuclockid): nanoseconds over all its threads,
also those that ended in between. /proc/PID/stat has the same sum in ticks of 10 ms, too coarse for a run of a second;
the schedstat files lose a thread when it ends. What kernel threads do for a process, as writing back its pages, is in
no clock of its own.
"""
import dataclasses
import os
import pathlib
import resource
import signal
import subprocess
import tempfile
import threading
import time


class Failed(Exception):
    """A server or client that did not do what it was started for. The text names it and says what it said."""


@dataclasses.dataclass
class Finished:
    """A client that ended well."""
    stdout: str
    cpu_seconds: float
    wall_seconds: float


def cpu_seconds(pid):
    """CPU time of a running process so far, all threads, user and system."""
    # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of the kernel's posix-timers.h.
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


def memory_kib(pid, field):
    """VmRSS (resident now) or VmHWM (at most so far) of a running process."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise Failed(f"process {pid} has no {field}: it has ended")


def last_line(log):
    """The last thing a program said, for a message of one line."""
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def start(command, log, stdout=subprocess.DEVNULL):
    """Starts a child in a session of its own: Ctrl-C reaches us alone, and we end the children in order."""
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, start_new_session=True)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from error


def end(child):
    """Ends a child: politely, and after ten seconds for good."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def run_client(command, timeout):
    """Runs a client to its end; anything but success within the time is a failure."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        began = time.monotonic()
        child = start(command, log, out)
        watchdog = threading.Timer(timeout, child.kill)
        watchdog.start()
        try:
            # Not Popen.wait: wait4 also tells the CPU time of this very child.
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            watchdog.cancel()
            end(child)
        wall = time.monotonic() - began
        if child.returncode != 0:
            how = f"did not end within {timeout:.0f} s" if wall >= timeout else f"status {child.returncode}"
            raise Failed(f"{command[0]}: {how}: {last_line(log)}")
        out.seek(0)
        return Finished(out.read().decode(), usage.ru_utime + usage.ru_stime, wall)


def interrupts_raise():
    """SIGTERM and SIGHUP clean up as Ctrl-C does; during that, further signals change nothing."""
    def once(_number, _frame):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, once)


def allow_descriptors(count):
    """Lets us and our children have so many descriptors, as far as the hard limit goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
