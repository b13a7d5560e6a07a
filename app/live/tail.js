// One layer's experts sorted by router mass, what they add up to, and the budget's cut, which can be moved.
const tailView = find(".mss-tail"), lost = find(".mss-lost"), canMove = Boolean(props.movable);
const MOVING_MS = 60;
let tailBox = null, askedCut = null, cutTimer = null;
if (canMove) {
  tailView.tabIndex = 0;
  tailView.setAttribute("role", "slider");
}

// What the budget kept stands first, whatever it was ranked by: the cut is then one line.
function sortedExperts(row) {
  const at = (expert) => row * layers.num_experts + expert;
  const all = Array.from({ length: layers.num_experts }, (_, expert) =>
    sums ? { expert, state: cell(row, expert).state, share: sums.mass[at(expert)] / 65535 } : { expert, ...cell(row, expert) });
  return all.sort((a, b) => (sums ? 0 : (b.state & KEPT) - (a.state & KEPT)) || b.share - a.share);
}

function drawTail() {
  const { pen, width, height } = prepare(tailView);
  if (!layers) {
    note(pen, "One layer's experts, sorted by router mass, with the budget's cut.");
    setText(lost, "");
    return;
  }
  const row = chosenRow(), sorted = sortedExperts(row), isBudgeted = layers.mass_kept.some((share) => share < 1);
  const numKept = sorted.filter(({ state }) => state & KEPT).length, numNatural = sorted.filter(({ state }) => state & NATURAL).length;
  const barWidth = width / sorted.length, most = Math.max(...sorted.map(({ share }) => share)), floor = height - 24;
  tailBox = { barWidth, sorted, top: 12, floor };
  sorted.forEach(({ share, state }, n) => drawBar(pen, state, share, most, n * barWidth, Math.max(1, barWidth - 1), floor));
  drawCumulative(pen, sorted, barWidth, floor);
  const cut = askedCut === null ? (isBudgeted ? numKept : null) : askedCut;
  if (cut !== null && !sums) drawMark(pen, cut * barWidth, width, floor, `the cut: ${cut} experts`, colours.ink, 9);
  if (!sums && numNatural !== cut) drawMark(pen, numNatural * barWidth, width, floor, `natural: ${numNatural}`, colours.soft, cut === null ? 9 : 21);
  drawLost(pen, width, height);
  const natural = sorted.filter(({ state }) => state & NATURAL), read = natural.filter(({ state }) => state & ACTIVE).length;
  setText(lost, askedCut !== null && !sums ? `the budget is ${askedCut} experts from the next step on` : sums ? `mean over ${plural(sums.numSteps, "step")}` : isBudgeted
    ? `${read} of ${natural.length} natural experts read; ${percent(1 - layers.mass_kept[row])} of the mass is beyond the cut`
    : `${natural.length} natural experts, all read`);
  tailView.setAttribute("aria-label", canMove ? "Experts per layer: the budget's cut" : `Layer ${layers.numbers[row]}: ${lost.textContent}`);
  if (canMove) {
    const attributes = { "aria-valuemin": layers.top_k, "aria-valuemax": layers.num_experts, "aria-valuenow": cut === null ? layers.num_experts : cut,
      "aria-valuetext": `layer ${layers.numbers[row]}: ${cut === null ? "no budget" : `${cut} experts`}, ${lost.textContent}` };
    for (const name in attributes) tailView.setAttribute(name, attributes[name]);
  }
}
function drawBar(pen, state, share, most, x, w, floor) {
  const h = Math.max(1, (floor - 12) * (share / most));
  pen.fillStyle = shadeOf(share, most);
  if (sums) pen.fillRect(x, floor - h, w, h);
  else if (state & ACTIVE) {
    pen.fillStyle = colours.accent;
    pen.fillRect(x, floor - h, w, h);
  } else if (state & NATURAL) hatch(pen, x, floor - h, w, h);
  else {
    pen.lineWidth = 1;
    pen.strokeStyle = colours.line;
    pen.strokeRect(x + 0.5, floor - h + 0.5, w - 1, h - 1);
  }
}
function drawCumulative(pen, sorted, barWidth, floor) {
  pen.beginPath();
  pen.moveTo(0, floor);
  let sum = 0;
  sorted.forEach(({ share }, n) => { sum += share; pen.lineTo((n + 1) * barWidth, floor - (floor - 12) * Math.min(1, sum)); });
  pen.strokeStyle = colours.soft;
  pen.lineWidth = 1;
  pen.stroke();
}
function drawMark(pen, at, width, floor, text, colour, y) {
  const x = Math.round(at) - 0.5, isRight = x > width - 120;
  pen.save();
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = 1.5;
  pen.beginPath();
  pen.moveTo(x, y - 9);
  pen.lineTo(x, floor);
  pen.stroke();
  pen.textAlign = isRight ? "end" : "start";
  pen.strokeStyle = colours.shades[0]; // around the words: the other mark may stand right behind them
  Object.assign(pen, { lineWidth: 4, lineJoin: "round" });
  pen.strokeText(text, x + (isRight ? -5 : 5), y);
  pen.fillText(text, x + (isRight ? -5 : 5), y);
  pen.restore();
}
function drawLost(pen, width, height) {
  const slot = width / layers.numbers.length, most = Math.max(0.25, ...layers.mass_kept.map((share) => 1 - share));
  layers.mass_kept.forEach((share, row) => {
    pen.fillStyle = colours.line;
    pen.fillRect(row * slot, height - 14, slot - 4, 3);
    pen.fillStyle = row === chosenRow() ? colours.accent : colours.soft;
    pen.fillRect(row * slot, height - 14, ((slot - 4) * (1 - share)) / most, 3);
    if (slot > 44) pen.fillText(`${layers.numbers[row]}: −${percent(1 - share)}`, row * slot, height - 1);
  });
}

// Moving the cut asks for another budget; the next steps show what it does.
function askForCut(count) {
  if (!layers) return;
  const cut = Math.max(layers.top_k, Math.min(layers.num_experts, count));
  if (cut === askedCut) return;
  askedCut = cut;
  drawTail();
  clearTimeout(cutTimer); // while it moves, only where it rests for a moment
  cutTimer = setTimeout(() => trigger("cut", { budget: cut }), MOVING_MS);
}
const cutAt = (event) => Math.round(event.offsetX / tailBox.barWidth);
let isDragging = false;
tailView.addEventListener("pointerdown", (event) => {
  if (!layers || !tailBox) return;
  if (event.offsetY > tailBox.floor) { chooseLayer(Math.floor((event.offsetX / tailView.clientWidth) * layers.numbers.length)); return; }
  if (!canMove) return;
  isDragging = true;
  tailView.setPointerCapture(event.pointerId);
  askForCut(cutAt(event));
});
tailView.addEventListener("pointerup", () => { isDragging = false; });
tailView.addEventListener("pointermove", (event) => {
  if (isDragging) { hideTip(); askForCut(cutAt(event)); return; }
  const bar = layers && tailBox && tailBox.sorted[Math.floor(event.offsetX / tailBox.barWidth)];
  showTip(event, bar ? `${describeCell(chosenRow(), bar.expert)}${canMove ? " · drag to move the budget" : ""}` : "");
});
tailView.addEventListener("pointerleave", hideTip);
tailView.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -8, PageUp: 8 }[event.key];
  if (!canMove || !layers || !step) return;
  event.preventDefault();
  askForCut(Number(tailView.getAttribute("aria-valuenow")) + step);
});
