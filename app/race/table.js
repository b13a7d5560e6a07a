// The table: contestants are columns, every number measured, ratios to the reference's.
const FIGURES = [ // name, label, whether a ratio is told, how a value is written
  ["tokens_per_s", "tokens/s, after the first token", true, (value) => value.toFixed(1)],
  ["accepted", "accepted guesses per step", false, (value) => value.toFixed(2)],
  ["experts", "experts read per layer, in a step", true, (value) => value.toFixed(1)],
  ["mass", "router mass kept", false, (value) => percent(value)],
  ["bytes", "expert bytes read per token", true, (value) => `${(value / 1e6).toFixed(2)} MB`],
];

function buildTable() {
  const table = make("table"), top = make("thead"), body = make("tbody"), head = make("tr");
  table.append(make("caption", "mss-spoken", "What was measured, by contestant"), top, body);
  top.append(head);
  head.append(make("td"));
  for (const lane of lanes) {
    const cell = make("th", "", `${lane.letter} ${lane.name}`);
    cell.scope = "col";
    cell.append(notes(isReference(lane) ? ["reference"] : []));
    head.append(cell);
  }
  for (const figure of FIGURES) body.append(buildRow(figure[1], (lane) => tellFigure(lane, ...figure)));
  body.append(buildRow("lossless", (lane) => lane.lossless ? ["yes", ["the target's own text"]] : ["no", ["a budget changed routing"]]));
  body.append(buildRow("equal beginning", (lane) => {
    if (isReference(lane) || lane.equal === undefined) return ["–", []];
    return [lane.is_same ? "all" : plural(lane.equal, "token"), [`of ${lane.numTokens}`]];
  }));
  return table;
}
function buildRow(label, tell) {
  const made = make("tr"), head = make("th", "", label);
  head.scope = "row";
  made.append(head);
  for (const lane of lanes) {
    const cell = make("td"), [value, beside] = isDone(lane) ? tell(lane) : ["–", []];
    cell.append(make("b", "", value), notes(beside));
    made.append(cell);
  }
  return made;
}
function notes(parts) {
  const made = make("small");
  made.append(...parts.map((part) => make("span", "", part)));
  return made;
}
function tellFigure(lane, name, label, hasRatio, write) {
  const found = lane.figures[name], base = isDone(lanes[reference]) && lanes[reference].figures[name];
  if (!found) return ["–", ["one token: no step"]];
  const [median, least, most] = found, beside = [];
  if (hasRatio && base && base[0] && !isReference(lane)) beside.push(`${(median / base[0]).toFixed(2)}×`);
  if (write(least) !== write(most)) beside.push(`${write(least)}–${write(most)}`);
  if (lane.num_shared && name === "tokens_per_s") beside.push(`${lane.num_shared} shared`);
  return [write(median), beside];
}
function tellRuns() {
  const counts = lanes.filter(isDone).map((lane) => lane.num_runs), most = Math.max(...counts), least = Math.min(...counts);
  if (!counts.length) return "";
  const ratios = `× is the ratio to ${called(lanes[reference])}`;
  if (most === 1) return `measured once each: no spread is known · ${ratios}`;
  return `medians and range of ${least === most ? most : `${least} to ${most}`} runs each, in turns · ${ratios}`;
}
