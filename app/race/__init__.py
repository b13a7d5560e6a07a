"""Settings compared on one prompt: what is compared, how it runs, what came of it, and the component that shows it."""

from app.race.contest import Contest, Slot, slot_of
from app.race.race import race_panel
from app.race.running import Running

__all__ = ["Contest", "Running", "Slot", "race_panel", "slot_of"]
