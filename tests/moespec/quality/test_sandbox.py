"""Generated programs are run to their end or not at all: what a program must not do fails, and leaves no trace."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from moespec.quality.sandbox import passes


def test_a_program_that_ends_well_passes():
    assert passes("import math, re, collections\nfrom typing import List\nassert math.isqrt(17) == 4")


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "def f(:",
        "raise SystemExit(0)",
        "exit()",
        "import os\nos._exit(0)",
        "import os\nos._exit(77)",
        "import posix\nposix._exit(77)",
        "from os import _exit as leave\nleave(77)",
        "import importlib, os, posix\nimportlib.reload(os)._exit(77)",
        "import sys\ndel sys.modules['posix']\nimport posix\nposix._exit(77)",
        "import sys\nsys.exit(77)",
        "x = bytearray(2**31)",
        "import os\nos.fork()",
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import ctypes\nctypes.CDLL(None)",
        "import os\nos.system('true')",
        "import os\nos.kill(os.getppid(), 0)",
    ],
)
def test_what_ends_badly_or_is_forbidden_fails(program):
    assert not passes(program)


def test_a_loop_is_ended_in_time():
    began = time.monotonic()
    assert not passes("while True: pass", timeout_s=0.5)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w').write('x')",
        "import os\nos.close(os.open({path!r}, os.O_CREAT | os.O_WRONLY))",
        "import os\nos.mkdir({path!r})",
        "import os\nos.mkfifo({path!r})",
        "import posix\nposix.mkfifo({path!r})",
        "import os\nos.mknod({path!r})",
        "import posix\nposix.mknod({path!r})",
        "import sqlite3\nsqlite3.connect({path!r}).execute('create table t (x)')",
        "import _sqlite3\n_sqlite3.connect({path!r})",
        "import __main__\nvars(__main__).update(forbidden=(), modules=(), writing=0)\nopen({path!r}, 'w').close()",
        "import __main__\nvars(__main__).update(end=print, fail=print, guard=print)\nopen({path!r}, 'w').close()",
    ],
)
def test_no_file_is_written_even_if_the_program_catches_everything(tmp_path: Path, attempt: str):
    path = tmp_path / "written"
    body = "\n".join(f"    {line}" for line in attempt.format(path=str(path)).splitlines())
    assert not passes(f"try:\n{body}\nexcept BaseException:\n    pass")
    assert not path.exists()


def test_no_file_is_removed(tmp_path: Path):
    path = tmp_path / "kept"
    path.write_text("kept")
    assert not passes(f"import os\nos.remove({str(path)!r})")
    assert path.read_text() == "kept"


@pytest.mark.parametrize(
    "attempt",
    [
        "import os\n    os.utime({path!r}, (0, 0))",
        "import os\n    os.setxattr({path!r}, 'user.x', b'x')",
        "import os\n    os.removexattr({path!r}, 'user.x')",
        "import dbm",
        "import _posixshmem\n    _posixshmem.shm_unlink('/no such memory')",
    ],
)
def test_attributes_and_stores_are_out_of_reach_even_if_the_program_catches_everything(tmp_path: Path, attempt):
    path = tmp_path / "kept"
    path.write_text("kept")
    before = path.stat().st_mtime_ns
    assert not passes(f"try:\n    {attempt.format(path=str(path))}\nexcept BaseException:\n    pass")
    assert path.stat().st_mtime_ns == before


def test_a_program_finds_nothing_of_the_guard_in_main():
    assert passes("import __main__\nassert all(name.startswith('__') for name in vars(__main__)), vars(__main__)")


def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        assert not passes(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
        with pytest.raises(TimeoutError):
            server.accept()
