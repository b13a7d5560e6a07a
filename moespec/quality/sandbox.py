"""Runs a generated program that nobody has read: in a process of its own, with limits on time, memory and the system.

Owns the containment. A program may compute and read files; the first attempt to write a file, start a process, use
the network or load native code ends it as failed. The process has no network at all where the system allows `unshare`.
This stops careless programs, not hostile ones: Python code that attacks the interpreter itself can get around a guard
which lives in the same interpreter. Knows nothing of tasks or of what is asserted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile

TIMEOUT_S = 5.0
MEMORY_BYTES = 512 * 2**20
_PASSED = 77  # no program ends with it by ending early: exit(), a failed assert and a crash end with other codes

# The guard runs first. An audit hook cannot be removed again, and sees these events before they happen. All of it is
# local to one function, whose name is gone before the program runs: a program can import __main__, and finds it empty.
_GUARD = f"""
def run():
    global run
    del run
    import os, posix, resource, sys
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, ({int(TIMEOUT_S) + 1}, {int(TIMEOUT_S) + 1}))
    program = sys.stdin.read()
    # Beginnings of event names: os.remove stands for os.removexattr too.
    forbidden = ("socket.", "ctypes.", "subprocess.", "shutil.", "sqlite3.", "os.fork", "os.posix_spawn", "os.exec",
        "os.spawn", "os.system", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
        "os.truncate", "os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr", "os.putenv", "os.unsetenv",
        "signal.pthread_kill")
    # An import is an event only where the module is not loaded yet: posix, below, can be had but not had anew.
    modules = {{"ctypes", "_ctypes", "_posixsubprocess", "multiprocessing", "_multiprocessing", "_posixshmem",
        "sqlite3", "_sqlite3", "dbm", "_dbm", "_gdbm", "resource", "posix"}}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    end = os._exit
    def fail(*args, **kwargs):
        end(1)
    def guard(event, args):
        if event.startswith(forbidden) or event == "import" and args[0] in modules or event == "open" and (
            args[2] & writing if isinstance(args[2], int) else True
        ):
            fail()
    # CPython raises no audit event for these.
    for module in (os, posix):
        module._exit = module.mkfifo = module.mknod = fail
    del sys.modules["resource"]
    sys.addaudithook(guard)
    try:
        exec(compile(program, "<program>", "exec"), {{"__name__": "__main__"}})
    except BaseException:
        fail()
    end({_PASSED})
run()
"""


def passes(program: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the program runs to its end: no exception, no early exit, nothing forbidden, in time and memory."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*_without_network(), sys.executable, "-I", "-B", "-S", "-c", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,  # a group of its own, so that all of it can be ended
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(program.encode("utf-8", "replace"), timeout=timeout_s)
        finally:
            _end_group(process)
    return process.returncode == _PASSED


def _end_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def _without_network() -> tuple[str, ...]:
    """A prefix that gives a process a network of its own with nothing in it, where the system allows that."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    prefix = (unshare, "--user", "--map-root-user", "--net")
    allowed = subprocess.run([*prefix, "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return prefix if allowed.returncode == 0 else ()
