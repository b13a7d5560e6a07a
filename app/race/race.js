// The race: what is shown of a contest (see outcome.py), and the clock that plays its runs back at true relative speed.
const SPEEDS = [1, 2, 5, 10, 20, 50, 100], WATCHED_MS = 5000, COPY = "Copy a link to this comparison";
const messageView = find(".mss-message"), spokenView = find(".mss-spoken"), progress = find(".race-progress"), noteView = find(".race-note");
const playButton = find(".race-play"), restartButton = find(".race-restart"), speedChoice = find(".race-speed");
const timeView = find(".race-time"), clock = find(".race-clock"), copyButton = find(".race-copy"), linkView = find(".race-link");
let link = "", lastSpoken = null, raceMs = 0, lastMs = 0, playedFrom = null; // playedFrom: {at, ms} while it plays

function drawRace() {
  const most = Math.max(1, ...lanes.map((lane) => lane.numTokens)), isPlaying = playedFrom !== null;
  for (const lane of lanes) {
    drawTrack(lane, raceMs, most);
    drawText(lane, raceMs);
    if (isPlaying) lane.body.scrollTop = lane.body.scrollHeight;
    else lane.canvas.setAttribute("aria-label", `${called(lane)}: ${lane.where.textContent}`);
  }
  setText(playButton, isPlaying ? "❚❚ pause" : "▶ play");
  playButton.setAttribute("aria-label", isPlaying ? "Pause the race" : "Play the race");
  setText(clock, lastMs ? `${seconds(raceMs)} of ${seconds(lastMs)}` : "–");
  timeView.value = raceMs;
  timeView.setAttribute("aria-valuetext", clock.textContent);
  root.dataset.playing = String(isPlaying);
}
function frame(now) {
  if (playedFrom === null) return;
  raceMs = Math.min(lastMs, playedFrom.ms + Math.max(0, now - playedFrom.at) / Number(speedChoice.value));
  if (raceMs >= lastMs) rest();
  else { drawRace(); requestAnimationFrame(frame); }
}
function play() {
  if (raceMs >= lastMs) raceMs = 0;
  playedFrom = { at: performance.now(), ms: raceMs };
  requestAnimationFrame(frame);
}
function rest() {
  playedFrom = null;
  drawRace();
  if (raceMs >= lastMs) lanes.filter(isDone).forEach(showParting);
}
function goTo(ms) {
  raceMs = ms;
  if (playedFrom !== null) playedFrom = { at: performance.now(), ms };
  drawRace();
}

// Who wants no motion sees the finish: where everyone is when the first is done.
function ready() {
  const done = lanes.filter(isDone).sort((a, b) => a.endMs - b.endMs), [first] = done;
  lastMs = done.length ? done.at(-1).endMs : 0;
  playButton.disabled = restartButton.disabled = !lastMs || isCalm();
  timeView.disabled = !lastMs;
  timeView.max = lastMs;
  speedChoice.value = SPEEDS.find((factor) => lastMs * factor >= WATCHED_MS) || SPEEDS.at(-1);
  raceMs = lastMs && isCalm() ? first.endMs : lastMs;
  if (!lastMs) setText(noteView, "");
  else if (isCalm()) setText(noteView, `The finish: where all are when ${first.letter} is done. You have asked for less motion; the slider moves the race.`);
  else setText(noteView, "Reading the prompt is not raced: the warm-up has read it. A lane ends where its answer ends.");
}

function take(value) {
  root.dataset.status = value.status || "idle";
  setText(messageView, value.message || "");
  // Aloud once for each answer, not with every count of its tokens.
  if (value.status !== "running" || value.num_finished !== lastSpoken) setText(spokenView, value.message || "");
  lastSpoken = value.num_finished;
  progress.max = value.num_runs || 1;
  progress.value = value.num_finished || 0;
  if (!value.lanes) return; // what is shown stays
  ({ link, reference } = value);
  lanes = value.lanes.map(readLane);
  find(".race-tracks").replaceChildren(...lanes.map(buildTrack));
  find(".race-texts").replaceChildren(...lanes.map(buildText));
  find(".race-figures").replaceChildren(buildTable());
  setText(find(".race-runs"), tellRuns());
  copyButton.disabled = false;
  linkView.hidden = true;
  ready();
  rest();
}

async function copyLink() {
  const address = `${location.origin}${location.pathname}?compare=${encodeURIComponent(link)}`;
  try {
    await navigator.clipboard.writeText(address);
    setText(copyButton, "Link copied");
    setTimeout(() => setText(copyButton, COPY), 2000);
  } catch { // not allowed here: it can be copied by hand
    linkView.hidden = false;
    linkView.value = address;
    linkView.select();
  }
}

speedChoice.append(...SPEEDS.map((factor) => new Option(factor === 1 ? "as it was" : `1/${factor}`, factor)));
playButton.addEventListener("click", () => (playedFrom === null ? play() : rest()));
restartButton.addEventListener("click", () => goTo(0));
speedChoice.addEventListener("change", () => goTo(raceMs));
timeView.addEventListener("input", () => goTo(Number(timeView.value)));
copyButton.addEventListener("click", copyLink);
watch("value", () => take(props.value || {}));
new ResizeObserver(drawRace).observe(root);
new MutationObserver(() => { colours = readColours(); drawRace(); }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
take(props.value || {});
