"""The page as it is served, on a port of this machine, with the service behind it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from app.limits import Limits
from app.main import serve
from app.queue import Queue
from app.service import Service
from moespec import Batch
from tests.browser.browser import free_port


@dataclass(frozen=True)
class Studio:
    """A page and what serves it."""

    address: str
    service: Service

    def is_idle(self) -> bool:
        return not self.service.queue.places and not self.service.stepper.batches[0]._members


@contextlib.contextmanager
def serving(service: Service) -> Iterator[Studio]:
    port = free_port()
    page = serve(service, "127.0.0.1", port)
    yield Studio(f"http://127.0.0.1:{port}", service)
    page.close(verbose=False)


@pytest.fixture(scope="session")
def studio():
    with serving(Service()) as studio:
        _ = studio.service.engine
        yield studio


@pytest.fixture
def unhurried(monkeypatch):
    """Answers take so long that a test can act while they are written."""
    own_step = Batch.step

    def step(batch: Batch) -> bool:
        time.sleep(0.05)
        return own_step(batch)

    monkeypatch.setattr(Batch, "step", step)


@pytest.fixture
def limit(studio, monkeypatch):
    """Give the page these limits, and nobody has asked anything yet."""

    def limit(**limits: Any) -> None:
        monkeypatch.setattr(studio.service, "limits", Limits(**limits))
        monkeypatch.setattr(studio.service, "queue", Queue(studio.service.limits, studio.service._models))

    return limit


def wait_until(is_so: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < 60, "it did not come about within a minute"
        time.sleep(0.02)
