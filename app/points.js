// Draws {caption, columns, rows} as a table; rows that have settings get a button. Rows are kept where they stay the
// same, so that focus stays where it was while others are added.
const table = element.querySelector("table"), room = element.querySelector(".points-room");
const emptyLine = element.querySelector(".points-empty");
const caption = table.createCaption(), head = table.createTHead(), body = table.createTBody();

function make(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}
function rangeOf({ low, at, high }) {
  const range = make("span", "", "points-range"), bar = make("i", ""), mark = make("b", "");
  range.setAttribute("aria-hidden", "true");
  bar.style.left = `${100 * low}%`;
  bar.style.width = `${100 * (high - low)}%`;
  mark.style.left = `${100 * at}%`;
  range.append(bar, mark);
  return range;
}
function drawCell(cell, value) {
  cell.textContent = typeof value === "string" ? value : value.text;
  if (typeof value !== "string") cell.append(rangeOf(value));
}
function drawRow(row, { name, cells, settings }, hasButtons) {
  const now = JSON.stringify([name, cells, settings, hasButtons]);
  if (row.dataset.now === now) return;
  row.dataset.now = now;
  while (row.cells.length < cells.length + 1) row.append(document.createElement(row.cells.length ? "td" : "th"));
  row.cells[0].scope = "row";
  row.cells[0].textContent = name;
  cells.forEach((value, place) => drawCell(row.cells[place + 1], value));
  if (!hasButtons) return;
  const button = row.querySelector("button") || row.insertCell().appendChild(make("button", "Load", ""));
  button.type = "button";
  button.setAttribute("aria-label", `Load into the chat: ${name}`);
  button.onclick = () => trigger("chosen", { settings });
}
function draw() {
  const value = props.value || {}, columns = value.columns || [], rows = value.rows || [];
  const hasButtons = rows.some((row) => row.settings);
  emptyLine.textContent = rows.length ? "" : props.empty;
  room.hidden = !rows.length;
  room.setAttribute("aria-label", value.caption || "");
  caption.textContent = value.caption || "";
  const heads = [...columns, ...(hasButtons ? ["into the chat"] : [])];
  if (head.textContent !== heads.join("")) {
    head.replaceChildren(document.createElement("tr"));
    heads.forEach((name) => { const cell = make("th", name, ""); cell.scope = "col"; head.rows[0].append(cell); });
    body.replaceChildren();
  }
  while (body.rows.length > rows.length) body.lastChild.remove();
  rows.forEach((row, place) => drawRow(body.rows[place] || body.insertRow(), row, hasButtons));
}

// Gradio draws a figure anew, on a new element, for every value.
const heard = new WeakSet();
function listen() {
  const drawn = document.querySelector(`#${props.plot} .js-plotly-plot`);
  if (!drawn || !drawn.on || heard.has(drawn)) return;
  heard.add(drawn);
  drawn.on("plotly_click", ({ points }) => {
    const settings = points[0] && points[0].customdata;
    if (typeof settings === "string") trigger("chosen", { settings: JSON.parse(settings) });
  });
}
if (props.plot) {
  const place = element.closest('[role="tabpanel"]') || document.body;
  new MutationObserver(listen).observe(place, { childList: true, subtree: true, attributeFilter: ["class"] });
  listen();
}
draw();
watch("value", draw);
