"""The page on an engine that takes its time, so that an answer is still being written when a test's next line comes."""

import time
from typing import Any

from app.main import launch
from moespec import Batch

PAUSE_S = 0.1  # 2,048 tokens take half a minute where every draft is right
own_step = Batch.step


def unhurried_step(batch: Batch) -> bool:
    time.sleep(PAUSE_S)
    return own_step(batch)


patched: Any = Batch
patched.step = unhurried_step

if __name__ == "__main__":
    launch()
