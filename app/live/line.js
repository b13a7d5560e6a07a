// The time line: four small charts over the steps of an answer, and the scrubber that goes with them.
const lineView = find(".mss-line"), range = find(".mss-range"), playButton = find(".mss-play");
const exportLinks = find(".mss-exports"), newestButton = find(".mss-newest"), answersChoice = find(".mss-answers"), stepLabel = find(".mss-step-label");
const LABELS_WIDTH = 62, WIDEST = 14, CHARTS = ["tokens", "experts", "ms", "mass"];
const SPARE = 1.25; // while an answer is written there is room for so many times its steps: columns seldom become narrower
// Columns that are drawn stay, on a sheet of their own: a long answer costs no more to draw at its end than at its start.
const sheet = document.createElement("canvas");
let sheetKey = "", sheetColours = null, numOnSheet = 0, slot = WIDEST;

const total = (step) => step.draft + step.verify + step.other;
const CHART_VALUES = {
  tokens: (step) => step.tokens, experts: (step) => Math.max(step.natural, step.active), ms: total, mass: () => 1,
};

function drawLine(run, index) {
  const { pen, width, height } = prepare(lineView);
  if (!width) return; // on a tab that is not shown
  const decoded = run ? run.steps.length - 1 : 0;
  if (decoded < 1) {
    note(pen, "One column per step: tokens, experts, milliseconds and mass.");
    return;
  }
  slot = slotOf(decoded, width - LABELS_WIDTH);
  const row = height / CHARTS.length, bar = Math.max(0.75, slot - (slot > 3 ? 1 : 0)), most = CHARTS.map((name) => mostOf(run, name));
  pen.fillStyle = colours.soft;
  CHARTS.forEach((name, n) => {
    const text = name === "mass" ? "mass" : `${name} ${most[n] < 10 && name === "ms" ? most[n].toFixed(1) : Math.round(most[n])}`;
    pen.fillText(text, 0, (n + 1) * row - 4);
  });
  drawColumns(run, row, bar, most);
  const scaled = pen.getTransform();
  pen.resetTransform(); // pixel by pixel
  pen.drawImage(sheet, 0, 0);
  pen.setTransform(scaled);
  if (index > 0) {
    pen.strokeStyle = colours.ink;
    pen.lineWidth = 1;
    pen.strokeRect(LABELS_WIDTH + (index - 1) * slot - 0.5, 0.5, Math.max(2, bar + 1), height - 1);
  }
  const step = run.steps[index];
  lineView.setAttribute("aria-label", `Step ${index} of ${decoded}: ${describeStep(step)}`);
}
function slotOf(decoded, room) {
  const few = Math.floor(room / WIDEST), isWriting = view.mode === "follow" && root.dataset.status === "writing";
  if (decoded <= few) return WIDEST;
  return room / (isWriting ? few * SPARE ** Math.ceil(Math.log(decoded / few) / Math.log(SPARE)) : decoded);
}
// The prompt's step, and the ms of the first after it, are no measure of the others.
const mostOf = (run, name) => run.steps.reduce((most, step, i) => Math.max(most, i > (name === "ms" ? 1 : 0) ? CHART_VALUES[name](step) : 0), 0);
function drawColumns(run, row, bar, most) {
  const key = [run.id, slot, lineView.width, lineView.height, ...most].join();
  if (key !== sheetKey || colours !== sheetColours) {
    [sheetKey, sheetColours, numOnSheet] = [key, colours, 1];
    sheet.width = lineView.width; // which empties it
    sheet.height = lineView.height;
  }
  const pen = sheet.getContext("2d"), ratio = lineView.width / sizeOf(lineView).width;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  for (; numOnSheet < run.steps.length; numOnSheet++) {
    CHARTS.forEach((name, n) => {
      const scale = (value) => Math.min(row - 3, ((row - 3) * value) / (most[n] || 1));
      drawColumn(pen, name, run.steps[numOnSheet], LABELS_WIDTH + (numOnSheet - 1) * slot, (n + 1) * row - 1, bar, scale);
    });
  }
}
function drawColumn(pen, name, step, x, floor, width, scale) {
  const block = (value, below, fill) => {
    pen.fillStyle = fill;
    pen.fillRect(x, floor - scale(below + value), width, Math.max(scale(value), value ? 0.5 : 0));
  };
  if (name === "tokens") {
    block(step.accepted, 0, colours.accent);
    block(step.tokens - step.accepted, step.accepted, colours.soft);
  } else if (name === "experts") {
    block(step.active, 0, colours.accent);
    if (step.natural > step.active) block(step.natural - step.active, step.active, colours.line);
  } else if (name === "ms") {
    block(step.draft, 0, colours.soft);
    block(step.verify, step.draft, colours.accent);
    block(step.other, step.draft + step.verify, colours.line);
  } else block(step.mass, 0, colours.shades[18]);
}
const describeStep = (step) => step.kind === "pr" ? "the prompt is read" :
  `${plural(step.tokens, "token")}, ${step.accepted} of them guessed · experts per layer ${step.natural.toFixed(1)} → ${step.active.toFixed(1)} · ` +
  `${step.draft.toFixed(1)} + ${step.verify.toFixed(1)} + ${step.other.toFixed(1)} ms · mass ${percent(step.mass)}`;

function drawScrubber(run, index) {
  const last = run ? run.steps.length - 1 : 0, isUsable = last > 0;
  if (range.max !== String(last)) range.max = last;
  if (range.value !== String(index)) range.value = index;
  for (const control of [range, playButton]) control.disabled = !isUsable;
  newestButton.disabled = !isUsable || (view.mode === "follow" && index === last);
  setText(playButton, view.mode === "play" ? "❚❚" : "▶");
  playButton.setAttribute("aria-label", view.mode === "play" ? "Pause" : "Play the steps");
  exportLinks.hidden = !isUsable || !props.exports;
  if (isUsable && exportLinks.dataset.run !== run.id) {
    exportLinks.dataset.run = run.id;
    [...exportLinks.children].forEach((link, n) => { link.href = `recordings/${encodeURIComponent(run.id)}.${["jsonl", "html"][n]}`; });
  }
  range.setAttribute("aria-valuetext", isUsable ? `step ${index} of ${last}` : "no steps yet");
  setText(stepLabel, isUsable ? `step ${index} of ${last}${run.title && run !== newestRun ? ` · ${run.title}` : ""}` : "");
}
const indexAt = (event) => {
  const decoded = view.run ? view.run.steps.length - 1 : 0;
  const n = 1 + Math.floor((event.offsetX - LABELS_WIDTH) / slot);
  return event.offsetX >= LABELS_WIDTH && n >= 1 && n <= decoded ? n : 0;
};
lineView.addEventListener("pointermove", (event) => {
  const n = indexAt(event);
  showTip(event, n ? `step ${n}: ${describeStep(view.run.steps[n])}` : "");
});
lineView.addEventListener("pointerleave", hideTip);
lineView.addEventListener("click", (event) => { const n = indexAt(event); if (n) hold(n); });
range.addEventListener("input", () => hold(Number(range.value)));
playButton.addEventListener("click", () => (view.mode === "play" ? hold(view.index) : play()));
newestButton.addEventListener("click", follow);
