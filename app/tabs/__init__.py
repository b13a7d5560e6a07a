"""One module per tab; each has `build(...)`, which is called inside the tab."""

from typing import Any

# Of events that wait for nobody: outside the queue, and no part of the API.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
