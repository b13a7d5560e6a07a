"""The live panels: one component that draws the newest step. `LiveRun` makes its frames."""

from app.live.live import LiveRun, live_panels, notice

__all__ = ["LiveRun", "live_panels", "notice"]
