"""One module per tab; each has `build(...)`, which is called inside the tab."""

from typing import Any

# Of the page's own events: no part of the API, and no widget hears how far they are. Gradio copies each that does, with
# all it holds, at every message of every event: 30 to 50 ms of a browser's time, ten times an answer.
QUIET: dict[str, Any] = {"show_progress": "hidden", "show_progress_on": [], "api_visibility": "private"}
AT_ONCE = QUIET | {"queue": False}  # of events that wait for nobody
