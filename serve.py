"""Starts the page. A Hugging Face Space runs this file; so does `make demo`."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # threads that wait longer leave the core to others

from app.main import launch

if __name__ == "__main__":
    launch()
