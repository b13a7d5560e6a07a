"""How smooth the page is, in Chromium: `python -m tests.browser.page_bench`, figures in the terminal and as JSON.

Recorded steps at 20 a second; answers of the model on the same cores; how fast they are written in an open page,
against answers that nobody reads, in turns; and an answer of 2,000 tokens, its beginning against its end. A benchmark,
not a test: machines differ, and are noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, CDPSession, Page

from tests.browser.browser import open_browser, serve_page
from tests.browser.page_bench_server import NUM_FRAMES, RATE_HZ, STEADY
from tests.browser.visitor import FRAME, LONG, Visitor

PROMPT = "Tell me a long story about a dog."
# Every animation frame: when it was, whether an answer is being written, the step that is shown.
WATCH = """() => {
  window.seen = []; window.longTasks = [];
  new PerformanceObserver((list) => list.getEntries().forEach((one) => window.longTasks.push(one.duration)))
    .observe({ type: "longtask" });
  const panels = document.querySelector("#live .mss");
  const look = () => {
    window.seen.push([Date.now(), panels.dataset.status === "writing", Number(panels.dataset.step)]);
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""


@dataclass
class Seen:
    """What a watched answer looked like. late_ms: from a step's making to its being on screen, it or a newer one, 95th
    of 100."""

    shown_per_s: float
    frames_per_s: float
    late_ms: float
    most_late_ms: float
    longest_task_ms: float
    bytes_per_update: float | None = None


def exported(page: Page) -> str:
    """The address of the answer's trace, which ends in its recording's id."""
    link = page.locator("#live .mss-exports a").first.get_attribute("href")
    assert link is not None
    return link


def seen(page: Page, address: str) -> Seen:
    """Of the answer that was watched since `WATCH`."""
    recording_id = exported(page).rpartition("/")[2].removesuffix(".jsonl")
    made = page.request.get(f"{address}/made/{recording_id}").json()
    frames, tasks = page.evaluate("[window.seen, window.longTasks]")
    writing = [(now, step) for now, is_writing, step in frames if is_writing]
    seconds = (writing[-1][0] - writing[0][0]) / 1e3
    shown = iter(writing)
    now, newest = next(shown)
    late = []
    for step in range(writing[-1][1] + 1):
        while newest < step:
            now, newest = next(shown)
        late.append(now - made[step])
    late.sort()
    return Seen(
        shown_per_s=len({step for _, step in writing}) / seconds,
        frames_per_s=len(writing) / seconds,
        late_ms=late[int(0.95 * (len(late) - 1))],
        most_late_ms=late[-1],
        longest_task_ms=max(tasks, default=0.0),
    )


def received(session: CDPSession) -> list[int]:
    """A list to which the browser's network adds what it receives, in bytes."""
    sizes: list[int] = []
    session.send("Network.enable")
    session.on("Network.dataReceived", lambda event: sizes.append(event["dataLength"]))
    return sizes


def heap_mb(session: CDPSession) -> float:
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(one["value"] for one in metrics if one["name"] == "JSHeapUsedSize") / 1e6


def steady(browser: Browser, address: str) -> Seen:
    visitor = Visitor(browser, address)
    session = visitor.page.context.new_cdp_session(visitor.page)
    visitor.page.wait_for_timeout(3000)
    sizes = received(session)
    visitor.page.evaluate(WATCH)
    visitor.ask(STEADY)
    visitor.wait("writing")
    visitor.page.wait_for_timeout(1e3 * NUM_FRAMES / RATE_HZ)
    visitor.wait("done")
    found = seen(visitor.page, address)
    found.bytes_per_update = sum(sizes) / NUM_FRAMES
    visitor.page.context.close()
    return found


def tokens_per_s(page: Page, address: str) -> float:
    """Of the answer that the page shows, as the engine measured it."""
    last = page.request.get(f"{address}/{exported(page)}").text().strip().rpartition("\n")[2]
    return json.loads(last)["summary"]["tokens_per_s"]


def answer(browser: Browser, address: str, num_tokens: int, *, is_watched: bool) -> Seen | float:
    """Of the model. Looking at every frame takes time, too: without it, only how fast it was written."""
    visitor = Visitor(browser, address)
    page = visitor.page
    visitor.wait("recorded")
    visitor.ask_for_a_long_answer("Who are you?", num_tokens=64)  # prepares
    visitor.wait("done")
    if is_watched:
        page.evaluate(WATCH)
    visitor.ask_for_a_long_answer(PROMPT, num_tokens)
    page.wait_for_selector(f'{FRAME}[data-status="writing"]', timeout=LONG)
    is_done = f"document.querySelector('{FRAME}').dataset.status === 'done'"
    page.wait_for_function(is_done, timeout=4 * LONG, polling=500)  # as rarely as can be: by default at every frame
    found = seen(page, address) if is_watched else tokens_per_s(page, address)
    page.context.close()
    return found


def long_answer(browser: Browser, address: str) -> dict[str, Any]:
    """2,000 tokens: the first and the last fifth of its frames, and what the browser's heap grew by."""
    visitor = Visitor(browser, address)
    page = visitor.page
    session = page.context.new_cdp_session(page)
    visitor.ask_for_a_long_answer("Who are you?", num_tokens=64)
    visitor.wait("done")
    before = heap_mb(session)
    page.evaluate(WATCH)
    visitor.ask_for_a_long_answer(PROMPT, 2000)
    page.wait_for_selector(f'{FRAME}[data-status="writing"]', timeout=LONG)
    page.wait_for_selector(f'{FRAME}[data-status="done"]', timeout=4 * LONG)
    writing = [now for now, is_writing, _ in page.evaluate("window.seen") if is_writing]
    tasks = page.evaluate("window.longTasks")
    page.evaluate("window.seen = []")
    fifth = len(writing) // 5
    rates = [1e3 * fifth / max(1, part[-1] - part[0]) for part in (writing[:fifth], writing[-fifth:])]
    grown = heap_mb(session) - before
    page.context.close()
    return {
        "frames_per_s_first_fifth": rates[0],
        "frames_per_s_last_fifth": rates[1],
        "longest_task_ms": max(tasks, default=0.0),
        "heap_grew_mb": grown,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="answers that are read, watched and neither, in turns")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, help="also write the figures there")
    args = parser.parse_args()
    with serve_page("tests/browser/page_bench_server.py") as address, open_browser() as browser:
        found: dict[str, Any] = {"recorded at 20 a second": asdict(steady(browser, address))}
        blank = browser.new_page()
        alone = f"{address}/unwatched?prompt={PROMPT}&num_tokens={args.tokens}"
        live, speeds = [], []
        for _ in range(args.rounds):
            unread = blank.request.get(alone, timeout=4 * LONG).json()["tokens_per_s"]
            speeds.append((answer(browser, address, args.tokens, is_watched=False), unread))
            live.append(asdict(answer(browser, address, args.tokens, is_watched=True)))
        found["live"] = live
        ratios = sorted(read / unread for read, unread in speeds)
        found["tokens/s, read and unread"] = speeds
        found["read to unread"] = {"median": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}
        found["2,000 tokens"] = long_answer(browser, address)
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
