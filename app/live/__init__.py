"""The live panels: one component that draws any step of an answer, and the frames that it is sent."""

from app.live.frames import added_frame, notice
from app.live.keeper import keeper
from app.live.live import live_panels, opened

__all__ = [
    "added_frame",
    "keeper",
    "live_panels",
    "notice",
    "opened",
]
