// Layers by experts, and the tail of one layer. Shape carries the state, shade the router mass.
const heatView = find(".mss-heat"), tailView = find(".mss-tail"), layerChoice = find(".mss-layer");
const tip = find(".mss-tip");
const GUTTER = 26;
let cells = null, layers = null, heatBox = null, tailBox = null;

function unpack(frame) {
  const bytes = Uint8Array.from(atob(frame.cells), (c) => c.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}
const cell = (row, expert) => {
  const value = cells[row * layers.num_experts + expert];
  return { share: (value >> 3) / MASS_STEPS, state: value & 7 };
};
const isDropped = (state) => (state & NATURAL) && !(state & ACTIVE);
const isInPlace = (state) => (state & ACTIVE) && !(state & NATURAL);
const stateName = (state) =>
  isDropped(state) ? "dropped" : isInPlace(state) ? "read in place of another" : state & ACTIVE ? "read" : "not asked for";
const chosenRow = () => Math.max(0, layerChoice.selectedIndex);

function drawLayers(frame) {
  layers = frame;
  cells = frame && unpack(frame);
  if (frame && layerChoice.options.length !== frame.numbers.length) {
    layerChoice.replaceChildren(...frame.numbers.map((number) => new Option(number, number)));
    layerChoice.selectedIndex = frame.numbers.length >> 1;
  }
  drawHeat();
  drawTail();
}

function drawHeat() {
  const { pen, width, height } = prepare(heatView);
  if (!layers) {
    pen.fillStyle = colours.soft;
    pen.fillText("One row per layer, one column per expert: what a step reads and what it leaves out.", 8, 24);
    return;
  }
  const rows = layers.numbers.length, experts = layers.num_experts;
  const cellWidth = (width - GUTTER) / experts, cellHeight = height / rows;
  heatBox = { cellWidth, cellHeight };
  let most = 0;
  for (const value of cells) most = Math.max(most, (value >> 3) / MASS_STEPS);
  const gap = cellWidth > 5 && cellHeight > 5 ? 1 : 0;
  for (let row = 0; row < rows; row++) {
    pen.fillStyle = row === chosenRow() ? colours.accent : colours.soft;
    if (cellHeight > 9 || row % Math.ceil(10 / cellHeight) === 0) {
      pen.fillText(layers.numbers[row], 6, (row + 0.5) * cellHeight + 4);
    }
    for (let expert = 0; expert < experts; expert++) {
      const { share, state } = cell(row, expert);
      const x = GUTTER + expert * cellWidth, y = row * cellHeight, w = cellWidth - gap, h = cellHeight - gap;
      pen.fillStyle = shadeOf(share, most);
      if (state & ACTIVE) {
        pen.fillStyle = shadeOf(Math.max(share, 0.03 * most), most); // what is read is never mistaken for paper
        pen.fillRect(x, y, w, h);
        if (isInPlace(state)) {
          pen.strokeStyle = colours.ink;
          pen.lineWidth = 1.5;
          pen.strokeRect(x + 0.75, y + 0.75, w - 1.5, h - 1.5);
        }
      } else if (isDropped(state)) {
        pen.fillRect(x, y, w, h);
        hatch(pen, x, y, w, h);
      } else {
        pen.fillRect(x + w / 3, y + h / 3, w / 3, h / 3);
      }
    }
  }
  pen.strokeStyle = colours.accent;
  pen.lineWidth = 1;
  pen.strokeRect(GUTTER - 1.5, chosenRow() * cellHeight - 0.5, width - GUTTER + 1, cellHeight);
  const kept = layers.mass_kept.map((share) => percent(share)).join(", ");
  heatView.setAttribute("aria-label", `${rows} layers by ${experts} experts; router mass kept per layer: ${kept}. ` +
    "Arrow keys choose a layer.");
}

function drawTail() {
  const { pen, width, height } = prepare(tailView);
  const lost = find(".mss-lost");
  if (!layers) {
    pen.fillStyle = colours.soft;
    pen.fillText("One layer's experts, sorted by router mass, with the budget's cut.", 8, 24);
    lost.textContent = "";
    return;
  }
  const row = chosenRow();
  const sorted = Array.from({ length: layers.num_experts }, (_, expert) => ({ expert, ...cell(row, expert) }));
  // What the budget kept stands first, whatever it was ranked by: the cut is then one line.
  sorted.sort((a, b) => (b.state & KEPT) - (a.state & KEPT) || b.share - a.share);
  const budgeted = layers.mass_kept.some((share) => share < 1);
  const numKept = sorted.filter(({ state }) => state & KEPT).length;
  const barWidth = width / sorted.length, most = Math.max(...sorted.map(({ share }) => share)), floor = height - 24;
  tailBox = { barWidth, sorted };
  sorted.forEach(({ share, state }, n) => {
    const h = Math.max(1, (floor - 12) * (share / most)), x = n * barWidth, w = Math.max(1, barWidth - 1);
    pen.fillStyle = shadeOf(share, most);
    if (state & ACTIVE) {
      pen.fillStyle = colours.accent;
      pen.fillRect(x, floor - h, w, h);
    } else if (state & NATURAL) hatch(pen, x, floor - h, w, h);
    else pen.strokeStyle = colours.line, pen.strokeRect(x + 0.5, floor - h + 0.5, w - 1, h - 1);
  });
  pen.strokeStyle = pen.fillStyle = colours.ink;
  if (budgeted) {
    const x = Math.round(numKept * barWidth) - 0.5;
    pen.lineWidth = 1.5;
    pen.beginPath();
    pen.moveTo(x, 0);
    pen.lineTo(x, floor);
    pen.stroke();
    pen.textAlign = x > width - 120 ? "end" : "start";
    pen.fillText(`the cut: ${numKept} experts`, x + (x > width - 120 ? -5 : 5), 9);
    pen.textAlign = "start";
  }
  drawLost(pen, width, height);
  const natural = sorted.filter(({ state }) => state & NATURAL);
  const read = natural.filter(({ state }) => state & ACTIVE).length;
  lost.textContent = budgeted
    ? `${read} of ${natural.length} natural experts read; ${percent(1 - layers.mass_kept[row])} of the router mass is beyond the cut`
    : `${natural.length} natural experts, all read`;
  tailView.setAttribute("aria-label", `Layer ${layers.numbers[row]}: ${lost.textContent}.`);
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

function choose(row) {
  if (!layers) return;
  layerChoice.selectedIndex = Math.max(0, Math.min(layers.numbers.length - 1, row));
  drawHeat();
  drawTail();
}
layerChoice.addEventListener("change", () => choose(layerChoice.selectedIndex));
heatView.addEventListener("click", (event) => heatBox && choose(Math.floor(event.offsetY / heatBox.cellHeight)));
heatView.addEventListener("keydown", (event) => {
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (step) { event.preventDefault(); choose(chosenRow() + step); }
});

function showTip(event, text) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = root.getBoundingClientRect();
  const left = Math.min(event.clientX - box.left + 12, box.width - tip.offsetWidth - 4);
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${event.clientY - box.top + 16}px`;
}
const describe = (expert, { share, state }) => `expert ${expert}: ${percent(share, 2)} of the mass, ${stateName(state)}`;
heatView.addEventListener("pointermove", (event) => {
  if (!layers || !heatBox) return;
  const row = Math.floor(event.offsetY / heatBox.cellHeight);
  const expert = Math.floor((event.offsetX - GUTTER) / heatBox.cellWidth);
  const inside = row >= 0 && row < layers.numbers.length && expert >= 0 && expert < layers.num_experts;
  showTip(event, inside ? `layer ${layers.numbers[row]}, ${describe(expert, cell(row, expert))}` : "");
});
tailView.addEventListener("pointermove", (event) => {
  const bar = layers && tailBox && tailBox.sorted[Math.floor(event.offsetX / tailBox.barWidth)];
  showTip(event, bar ? describe(bar.expert, bar) : "");
});
for (const view of [heatView, tailView]) view.addEventListener("pointerleave", (event) => showTip(event, ""));
