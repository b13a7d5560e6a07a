// Layers by experts. Shape carries the state, shade the router mass; of an answer so far, a cell's filled part is the
// share of steps that read the expert, the hatched part the share that asked for it in vain.
const heatView = find(".mss-heat"), spanChoice = find(".mss-span"), layerChoice = find(".mss-layer");
const GUTTER = 26;
let layers = null, cells = null, sums = null, heatBox = null, cursor = { row: 0, expert: 0 };

const cell = (row, expert) => {
  const value = cells[row * layers.num_experts + expert];
  return { share: (value >> 3) / MASS_STEPS, state: value & 7 };
};
const isDropped = (state) => (state & NATURAL) && !(state & ACTIVE);
const isInPlace = (state) => (state & ACTIVE) && !(state & NATURAL);
const stateName = (state) =>
  isDropped(state) ? "dropped" : isInPlace(state) ? "read in place of another" : state & ACTIVE ? "read" : "not asked for";
const chosenRow = () => Math.max(0, layerChoice.selectedIndex);

let unpacked = null;
function drawLayers(frame, soFar) {
  if (frame !== unpacked) {
    unpacked = layers = frame;
    cells = frame && decode(frame.cells, Uint16Array);
  }
  sums = soFar && soFar.decoded;
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
    note(pen, "One row per layer, one column per expert: what a step reads and what it leaves out.");
    return;
  }
  const rows = layers.numbers.length, experts = layers.num_experts;
  const cellWidth = (width - GUTTER) / experts, cellHeight = height / rows;
  heatBox = { cellWidth, cellHeight };
  const shareOf = sums ? (at) => sums.mass[at] / 65535 : (at) => (cells[at] >> 3) / MASS_STEPS;
  let most = 0;
  for (let at = 0; at < rows * experts; at++) most = Math.max(most, shareOf(at));
  const gap = cellWidth > 5 && cellHeight > 5 ? 1 : 0, w = cellWidth - gap, h = cellHeight - gap;
  for (let row = 0; row < rows; row++) {
    pen.fillStyle = row === chosenRow() ? colours.accent : colours.soft;
    if (cellHeight > 9 || row % Math.ceil(10 / cellHeight) === 0) {
      pen.fillText(layers.numbers[row], 6, (row + 0.5) * cellHeight + 4);
    }
    for (let expert = 0; expert < experts; expert++) {
      const at = row * experts + expert, x = GUTTER + expert * cellWidth, y = row * cellHeight;
      if (sums) drawSummed(pen, at, shareOf(at), most, x, y, w, h);
      else drawCell(pen, cells[at] & 7, shareOf(at), most, x, y, w, h);
      const uses = selected.experts && selected.experts[row];
      if (uses && uses.has(expert)) outline(pen, x, y, w, h);
    }
  }
  pen.strokeStyle = colours.accent;
  pen.lineWidth = 1;
  pen.strokeRect(GUTTER - 1.5, chosenRow() * cellHeight - 0.5, width - GUTTER + 1, cellHeight);
  if (document.activeElement === heatView || selected.cell) outline(pen, GUTTER + cursor.expert * cellWidth, cursor.row * cellHeight, w, h);
  const kept = layers.mass_kept.map((share) => percent(share)).join(", ");
  heatView.setAttribute("aria-label", `${rows} layers by ${experts} experts; router mass kept per layer: ${kept}. ` +
    "Arrow keys choose a layer and an expert, Enter shows who used it.");
}
function outline(pen, x, y, w, h) {
  pen.strokeStyle = colours.ink;
  pen.lineWidth = 2;
  pen.strokeRect(x - 0.5, y - 0.5, w + 1, h + 1);
}
function drawCell(pen, state, share, most, x, y, w, h) {
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
  } else pen.fillRect(x + w / 3, y + h / 3, w / 3, h / 3);
}
function drawSummed(pen, at, share, most, x, y, w, h) {
  const read = (h * sums.active[at]) / 255, asked = (h * Math.max(sums.natural[at], sums.active[at])) / 255;
  pen.fillStyle = shadeOf(Math.max(share, 0.03 * most), most);
  if (read >= 0.5) pen.fillRect(x, y + h - read, w, read);
  if (asked - read >= 1) hatch(pen, x, y + h - asked, w, asked - read);
  if (asked < 0.5) pen.fillRect(x + w / 3, y + h / 3, w / 3, h / 3);
}

function describeCell(row, expert) {
  const name = `layer ${layers.numbers[row]}, expert ${expert}`, at = row * layers.num_experts + expert;
  if (sums) return `${name}: ${percent(sums.mass[at] / 65535, 2)} of the mass; asked for in ${percent(sums.natural[at] / 255, 0)} of the steps, read in ${percent(sums.active[at] / 255, 0)}`;
  return `${name}: ${describe(cell(row, expert))}`;
}
const describe = ({ share, state }) => `${percent(share, 2)} of the mass, ${stateName(state)}`;

function chooseLayer(row) {
  if (!layers) return;
  layerChoice.selectedIndex = Math.max(0, Math.min(layers.numbers.length - 1, row));
  drawHeat();
  drawTail();
}
const cellAt = (event) => {
  if (!layers || !heatBox) return null;
  const row = Math.floor(event.offsetY / heatBox.cellHeight), expert = Math.floor((event.offsetX - GUTTER) / heatBox.cellWidth);
  return row >= 0 && row < layers.numbers.length && expert < layers.num_experts ? { row, expert } : null;
};
layerChoice.addEventListener("change", () => chooseLayer(layerChoice.selectedIndex));
spanChoice.addEventListener("change", () => { unselect(); soon(); });
heatView.addEventListener("click", (event) => {
  const at = cellAt(event);
  if (!at) return;
  chooseLayer(at.row);
  if (at.expert >= 0) { cursor = at; chooseCell(at.row, at.expert); }
});
heatView.addEventListener("keydown", (event) => {
  if (!layers) return;
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [0, 0];
  if (down || right) {
    event.preventDefault();
    cursor = { row: Math.max(0, Math.min(layers.numbers.length - 1, cursor.row + down)),
      expert: Math.max(0, Math.min(layers.num_experts - 1, cursor.expert + right)) };
    chooseLayer(cursor.row);
    setText(spoken, describeCell(cursor.row, cursor.expert));
  } else if (event.key === "Enter") { event.preventDefault(); chooseCell(cursor.row, cursor.expert); }
});
heatView.addEventListener("pointermove", (event) => {
  const at = cellAt(event);
  showTip(event, at && at.expert >= 0 ? describeCell(at.row, at.expert) : "");
});
heatView.addEventListener("pointerleave", hideTip);
for (const type of ["focus", "blur"]) heatView.addEventListener(type, () => drawHeat());
