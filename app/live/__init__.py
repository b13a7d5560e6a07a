"""The live panels: one component that draws any step of an answer, and the frames that it is sent."""

from app.live.frames import Growing, live_frame, notice
from app.live.keeper import keeper
from app.live.live import live_panels, opened

__all__ = ["Growing", "keeper", "live_frame", "live_panels", "notice", "opened"]
