"""What the page says of what runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from app.main import _device_line
from moespec import Engine
from tests.conftest import tiny_model


def test_the_device_line_names_the_drafter_and_why_it_is_in_use():
    engine = Engine.from_model(tiny_model("olmoe"), drafter="auto")
    service: Any = SimpleNamespace(engine=engine, info=engine.info)
    assert "drafter n-gram (no head beside the target: prompt look-up)" in _device_line(service)
    engine.close()
