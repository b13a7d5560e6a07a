"""The page on an engine that takes its time, so that an answer is still being written when a test's next line comes."""

import time
from typing import Any

from app.main import launch
from moespec.run import Run
from moespec.trace import StepTrace

PAUSE_S = 0.1  # 2,048 tokens take half a minute where every draft is right
own_step = Run._step


def unhurried_step(run: Run) -> StepTrace:
    time.sleep(PAUSE_S)
    return own_step(run)


patched: Any = Run
patched._step = unhurried_step

if __name__ == "__main__":
    launch()
