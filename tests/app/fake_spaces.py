"""Stands in for the package `spaces` on ZeroGPU: a GPU function runs in a forked process, and only pickles pass.

As there: the arguments go through a queue, a yield is pickled as it comes, a closed generator is told to the worker
after its next yield, a worker that dies is an error. Every call has a worker of its own, so that nothing stays.
"""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

_forks = multiprocessing.get_context("fork")
asked_for: list[tuple[Any, str]] = []  # (seconds, size) of every call
workers: list[Any] = []
late: list[int] = []  # of every call that was closed: how many yields came afterwards


class Error(Exception):
    """As Gradio's: the text is its `message`."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message


def GPU(task: Callable, *, duration: Callable, size: str) -> Callable:
    def handler(*args: Any) -> Iterator[Any]:
        asked_for.append((duration(*args), size))
        (arguments, to_worker), (results, from_worker) = _forks.Pipe(False), _forks.Pipe(False)
        stop = _forks.Event()
        worker = _forks.Process(target=_in_a_thread, args=(task, arguments, from_worker, stop), daemon=True)
        worker.start()
        workers.append(worker)
        from_worker.close()  # the worker's alone, so that its death is an end of file
        to_worker.send_bytes(pickle.dumps(args))
        try:
            while True:
                try:
                    kind, value = pickle.loads(results.recv_bytes())
                except EOFError:
                    raise Error("<b>GPU task aborted</b>") from None
                if kind == "end":
                    return
                if kind == "error":
                    raise Error(value)
                yield value
        except GeneratorExit:
            stop.set()
            late.append(sum(1 for _ in iter(lambda: pickle.loads(results.recv_bytes())[0], "end")))
            raise
        finally:
            worker.join(60)

    return handler


def _in_a_thread(*args: Any) -> None:
    """As there. OpenMP's threads are those of the thread that started them: another one's did not come along."""
    thread = threading.Thread(target=_work, args=args)
    thread.start()
    thread.join()


def _work(task: Callable, arguments: Any, results: Any, stop: Any) -> None:
    values = task(*pickle.loads(arguments.recv_bytes()))
    try:
        for value in values:
            if stop.is_set():
                values.close()
                break
            results.send_bytes(pickle.dumps(("value", value)))
        results.send_bytes(pickle.dumps(("end", None)))
    except Exception as error:
        results.send_bytes(pickle.dumps(("error", type(error).__name__)))
