// What is shown: which answer, which step of it, and whether that moves. Takes frames (see frames.py) and draws at most
// once per animation frame.
const messageView = find(".mss-message");
const PLAY_MS = 320, REST_MS = 2600, SO_FAR_MS = 400;
const runs = new Map(); // of this conversation, by id
let newestRun = null, waiting = false, isFresh = true, timer = null, drawMs = 0;
let due = null; // said with the next drawing
let view = { run: null, index: 0, mode: "follow" }; // mode: follow, hold, play
let shownFrame = null, shownIndex = 0, soFar = { key: "", at: 0, isBusy: false };

// The server answers with what was asked for, or with {error}.
const asked = async (promise) => {
  const found = await promise;
  if (found && found.error) throw new Error(found.error);
  return found;
};
const source = {
  steps: (id, first, last) => asked(server.recorded_steps({ id, first, last })),
  facts: (id, first, last) => asked(server.recorded_facts({ id, first, last })),
  soFar: (id, last) => asked(server.recorded_so_far({ id, last })),
};

function take(frame) {
  isFresh = false;
  if (due) { say(due); due = null; }
  told = null;
  const known = runs.get(frame.run);
  if (frame.run && !frame.series && !(known && known.isWhole)) { // of an answer whose steps are to be asked for
    if (frame.status === "waiting") say(frame);
    else told = frame;
    wake();
    listen(frame.run);
    return;
  }
  say(frame);
  if (!frame.series) return;
  const run = new Run(frame.run, source, frame.title);
  run.extend(frame);
  run.drawnIndex = run.steps.length - 1;
  begin(run, frame);
}
function say(frame) {
  root.dataset.status = frame.status || "idle";
  // For the page's own style; told, because `:has` would look again at every change of the panels.
  if (props.movable) document.body.dataset.answer = root.dataset.status;
  const isAside = frame.status === "error" && newestRun && newestRun.isRecording;
  setText(messageView, `${frame.message || ""}${isAside ? " (What plays here was recorded.)" : ""}`);
  if (!["recorded", "opened", "still", "idle"].includes(frame.status)) return;
  forgetRuns();
  heard = null;
}
function begin(run, frame) {
  runs.set(run.id, run);
  newestRun = run;
  mostLeaves = 0;
  askedCut = null;
  closeCard();
  unselect();
  listAnswers();
  run.isRecording = frame.status === "recorded";
  if (run.isRecording || frame.status === "opened") start(run);
  else if (frame.status === "still") { view = { run, index: -1, mode: "hold" }; hold(frame.at); }
  else follow();
}
// The budget that was asked for by moving the tail's cut is in force.
function cutArrived(now) {
  if (askedCut !== null && now && now.settings.budget === askedCut) askedCut = null;
}
function forgetRuns() {
  runs.clear();
  newestRun = null;
  clearTimeout(timer);
  view = { run: null, index: 0, mode: "follow" };
  shownFrame = null;
  closeCard();
  listAnswers();
}
function listAnswers() {
  answersChoice.hidden = runs.size < 2;
  answersChoice.replaceChildren(...[...runs.values()].map((run) => new Option(run.title, run.id)));
  if (newestRun) answersChoice.value = newestRun.id;
}
answersChoice.addEventListener("change", () => {
  view = { run: runs.get(answersChoice.value), index: 0, mode: "hold" };
  hold(view.run.steps.length - 1);
});

function follow() {
  clearTimeout(timer);
  view = { run: newestRun, index: newestRun ? newestRun.steps.length - 1 : 0, mode: "follow" };
  if (newestRun) answersChoice.value = newestRun.id;
  if (newestRun && !newestRun.frames.has(newestRun.drawnIndex)) load(newestRun, newestRun.drawnIndex);
  soon();
}
// Stays at a step; `then` is given its frame with all details.
function hold(index, then) {
  if (!view.run) return;
  clearTimeout(timer);
  const isOther = index !== view.index && index !== shownIndex;
  askedCut = null; // that was of a step to come
  view = { run: view.run, index, mode: "hold" };
  if (isOther) closeCard();
  load(view.run, index, then);
  soon();
}
function load(run, index, then) {
  run.detailed(index).then((frame) => {
    if (run !== view.run || !frame) return;
    if (view.index === index || view.mode === "follow") { showFrame(frame, index); if (then) then(frame); }
    soon();
  }).catch((error) => setText(messageView, error.message));
}
// A recording runs by itself, unless its visitor wants no motion: then its last step is shown.
function start(run) {
  view = { run, index: 0, mode: "hold" };
  if (isCalm()) hold(run.steps.length - 1);
  else play();
}
function play() {
  clearTimeout(timer);
  const { run } = view, atEnd = view.index >= run.steps.length - 1;
  view = { run, index: atEnd ? 0 : view.index, mode: "play" };
  askedCut = null;
  closeCard();
  tick();
}
function tick() {
  const { run } = view, last = run.steps.length - 1;
  load(run, view.index);
  soon();
  if (view.index < last) timer = setTimeout(() => { view.index += 1; tick(); }, PLAY_MS);
  else if (root.dataset.status === "recorded") timer = setTimeout(() => { view.index = 0; tick(); }, REST_MS);
  else { view.mode = "hold"; soon(); }
}

function showFrame(frame, index) {
  shownFrame = frame;
  shownIndex = index;
}
function summed() {
  const { run } = view;
  if (spanChoice.value !== "answer" || !run) return null;
  const last = view.index + 1, key = `${run.id}:${last}`, wait = soFar.at + SO_FAR_MS - Date.now();
  if (soFar.key !== key && !soFar.isBusy) {
    soFar.isBusy = true;
    setTimeout(async () => {
      try {
        const found = await run.source.soFar(run.id, last);
        const decoded = found && { mass: decode(found.mass, Uint16Array), natural: decode(found.natural, Uint8Array),
          active: decode(found.active, Uint8Array), numSteps: found.num_steps };
        soFar = { key, run, decoded, at: Date.now(), isBusy: false };
      } catch (error) {
        soFar = { key, run, decoded: null, at: Date.now(), isBusy: false };
        setText(messageView, error.message);
      }
      soon();
    }, Math.max(0, wait));
  }
  return soFar.run === run ? soFar : null;
}

function figure(name, text) { setText(find(`[data-figure="${name}"]`), text); }
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
function drawFigures(figures, settings) {
  if (!figures) {
    for (const name of ["tokens_per_s", "accepted", "experts", "mass", "lossless"]) figure(name, "–");
    figure("force", "against the target alone");
    return;
  }
  figure("tokens_per_s", number(figures.tokensPerS, 1));
  figure("accepted", number(figures.accepted, 2));
  figure("experts", figures.natural === null ? "–" : `${number(figures.natural, 1)} → ${number(figures.active, 1)}`);
  figure("mass", figures.mass === null ? "–" : percent(figures.mass));
  figure("lossless", figures.lossless ? "lossless" : "lossy");
  if (!settings) return;
  const isFree = settings.budget === null && settings.coverage === null && ["substitution", "truncation"].includes(settings.policy);
  const budget = settings.coverage !== null ? `coverage ${settings.coverage}, ` : settings.budget === null ? "" : `budget ${settings.budget}, `;
  figure("force", isFree ? "no budget at this step" : `${budget}${settings.policy}`);
}

function draw() {
  const began = performance.now();
  waiting = false;
  if (due) { say(due); due = null; }
  if (isFresh) take(props.value || {});
  const { run } = view;
  if (run && view.mode === "follow") {
    view.index = run.steps.length - 1;
    const newest = run.frames.get(run.drawnIndex);
    if (newest) showFrame(newest, run.drawnIndex);
  }
  view.asked = shownFrame && shownFrame.settings.tree;
  root.dataset.mode = view.mode;
  root.dataset.step = run ? view.index : "";
  root.dataset.budget = shownFrame ? String(shownFrame.settings.budget) : "";
  drawFigures(run && run.figures(view.index), shownFrame && shownFrame.settings);
  drawLine(run, view.index);
  drawScrubber(run, view.index);
  drawTree(run && shownFrame ? shownFrame.tree : null);
  drawLayers(run && shownFrame ? shownFrame.layers : null, summed());
  writeWords();
  drawTokens(run, view.index); // last: to scroll, the browser lays out what all have changed
  scrollWords();
  drawMs = performance.now() - began;
}
function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(draw);
}
watch("value", () => {
  isFresh = true;
  soon();
  if (props.value && props.value.run && !props.value.series) take(props.value); // steps are asked for at once
});
new ResizeObserver(soon).observe(root);
new MutationObserver(() => { colours = readColours(); soon(); }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
if (props.only) root.dataset.only = props.only;
recolour();
soon();
