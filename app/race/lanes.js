// A contestant as it is drawn: its lane in the race and its text beside the others', at any time of the race. Draws with
// draw.js, which stands before it. Knows nothing of playing.
const LETTERS = "ABCD";
let lanes = [], reference = 0; // as they came; whom the others are held against

const seconds = (ms) => `${(ms / 1000).toFixed(3)} s`;
const isDone = (lane) => Boolean(lane.steps);
const isReference = (lane) => lane.number === reference;
const called = (lane) => `${lane.letter}, ${lane.name}`;

// Where each step ends, in tokens, and each token, in characters of the text.
function readLane(told, number) {
  const lane = { ...told, letter: LETTERS[number], number, ends: [0], offsets: [0], text: "", shown: -1 };
  for (const [, , pieces] of told.steps || []) {
    lane.ends.push(lane.ends.at(-1) + pieces.length);
    for (const piece of pieces) {
      lane.text += piece;
      lane.offsets.push(lane.text.length);
    }
  }
  lane.numTokens = lane.ends.at(-1);
  lane.endMs = isDone(told) ? told.steps.at(-1)[0] : 0;
  return lane;
}
// How many steps are over at a time.
function numSteps(lane, ms) {
  let low = 0, high = lane.steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lane.steps[middle][0] <= ms) low = middle + 1; else high = middle;
  }
  return low;
}

function named(lane) {
  const view = make("span", "race-name");
  view.append(make("b", "", lane.letter), ` ${lane.name}`);
  view.title = `${called(lane)}: ${lane.what}`;
  return view;
}
function buildTrack(lane) {
  const row = make("div", "race-lane");
  lane.canvas = make("canvas");
  lane.where = make("span", "race-where mss-soft");
  lane.canvas.setAttribute("role", "img");
  row.append(named(lane), lane.canvas, lane.where);
  return row;
}
// most: tokens of the longest answer, which fills its lane.
function drawTrack(lane, ms, most) {
  const { pen, width, height } = prepare(lane.canvas);
  if (!isDone(lane)) {
    setText(lane.where, "not finished yet");
    return;
  }
  const x = (tokens) => ((width - 2) * tokens) / most, gap = x(1) > 3 ? 1 : 0, top = 3, bar = height - 6;
  pen.strokeStyle = colours.soft;
  pen.setLineDash([3, 2]);
  pen.strokeRect(0.5, top + 0.5, x(lane.numTokens), bar - 1);
  pen.setLineDash([]);
  const over = numSteps(lane, ms), written = lane.ends[over];
  for (let n = 0; n < over; n++) {
    const from = lane.ends[n], own = from + lane.steps[n][1], to = lane.ends[n + 1];
    pen.fillStyle = colours.accent;
    pen.fillRect(x(from), top, x(own) - x(from), bar);
    pen.fillStyle = colours.soft;
    pen.fillRect(x(own), top, x(to) - x(own), bar);
    pen.clearRect(x(to) - gap, top, gap, bar);
  }
  const isOver = over === lane.steps.length;
  setText(lane.where, isOver ? `${plural(written, "token")} in ${seconds(lane.endMs)}` : `${written} of ${plural(lane.numTokens, "token")}`);
}

function buildText(lane) {
  const column = make("div"), head = make("div", "race-head");
  head.append(named(lane), make("span", "mss-soft", isReference(lane) ? "reference" : ""));
  lane.body = make("div", "race-text");
  lane.body.tabIndex = 0;
  lane.body.setAttribute("role", "group");
  lane.body.setAttribute("aria-label", `Text of ${called(lane)}`);
  column.append(head, make("div", "race-what", lane.what), lane.body, make("div", "race-equal", describeText(lane)), buildLinks(lane));
  return column;
}
function buildLinks(lane) {
  const links = make("div", "race-links");
  if (!lane.run) return links;
  const replay = make("button", "", "replay this one");
  replay.type = "button";
  replay.setAttribute("aria-label", `Replay ${called(lane)}`);
  replay.addEventListener("click", () => trigger("replay", { run: lane.run, title: lane.name }));
  links.append(replay, " export ");
  for (const [kind, label] of [["jsonl", "trace"], ["html", "page"]]) {
    const made = make("a", "", label);
    made.href = `recordings/${encodeURIComponent(lane.run)}.${kind}`;
    made.download = "";
    made.setAttribute("aria-label", `Export ${called(lane)} as a ${label}`);
    links.append(made);
  }
  return links;
}
function describeText(lane) {
  if (!isDone(lane)) return "Not finished yet.";
  const sentences = [`${plural(lane.numTokens, "token")}, ${lane.ending}.`], { letter } = lanes[reference];
  if (!isReference(lane) && lane.is_same) sentences.push(`The same as ${letter}, token for token.`);
  else if (!isReference(lane) && lane.equal !== undefined) sentences.push(`Equal to ${letter} for the first ${lane.equal} of ${lane.numTokens}.`);
  if (lane.num_texts > 1) sentences.push(`Its ${lane.num_runs} runs wrote ${lane.num_texts} texts; this is the one of the middle speed.`);
  return sentences.join(" ");
}

// Where a text parts from the reference's, and the reference's from the others': [place, letters], in order.
function partings(lane) {
  if (!isDone(lanes[reference])) return [];
  const places = new Map();
  for (const one of isReference(lane) ? lanes.filter((other) => !isReference(other) && isDone(other)) : [lane]) {
    if (!one.is_same) places.set(one.equal, [...(places.get(one.equal) || []), isReference(lane) ? one.letter : LETTERS[reference]]);
  }
  return [...places].sort((a, b) => a[0] - b[0]);
}
function drawText(lane, ms) {
  if (!isDone(lane)) return;
  const written = lane.ends[numSteps(lane, ms)];
  if (written === lane.shown) return;
  lane.shown = written;
  const part = (from, to) => lane.text.slice(lane.offsets[Math.min(from, written)], lane.offsets[Math.min(to, written)]);
  const made = [];
  let at = 0;
  for (const [place, letters] of partings(lane)) {
    made.push(make("span", isReference(lane) ? "" : "race-same", part(at, place)));
    const isEnd = place === lane.numTokens;
    if (place < written || (isEnd && written === place)) made.push(buildMark(isEnd ? null : part(place, place + 1), letters, place, isReference(lane)));
    at = Math.min(place + 1, lane.numTokens);
  }
  made.push(make("span", !isReference(lane) && lane.is_same ? "race-same" : "", part(at, lane.numTokens)));
  lane.body.replaceChildren(...made);
}
// A token that differs, or the end of a text (null) that another goes beyond.
function buildMark(token, letters, place, isLettered) {
  const mark = make("mark", "race-mark"), others = letters.join(" and ");
  mark.title = token === null ? `Ends here; ${others} goes on` : `Token ${place + 1}: the first that differs from ${others}`;
  if (isLettered) mark.append(make("sup", "", letters.join("")));
  mark.append(token === null ? "∎" : token.trim() ? token : visible(token));
  if (token !== null && !token.trim() && token.includes("\n")) mark.append("\n");
  return mark;
}
// Brings the first mark into view; a text without one to its top.
function showParting(lane) {
  const mark = lane.body.querySelector(".race-mark");
  lane.body.scrollTop = mark ? mark.offsetTop - lane.body.clientHeight / 2 : 0;
}
