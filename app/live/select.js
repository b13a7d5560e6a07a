// What is selected: a node of the tree, or an expert. Holds the step it belongs to, marks what it touches, opens the card.
let selected = { node: -1, rows: null, experts: null, cell: null };

function unselect() {
  selected = { node: -1, rows: null, experts: null, cell: null };
  soon();
}

// Rows' routing in one layer, decoded once per frame: run [{expert, weight}], natural [expert], per row.
function routing(frame) {
  const { details, tree, layers: map } = frame;
  if (!details) return null;
  if (!details.routing) {
    const ids = decode(details.ids, Uint16Array), weights = decode(details.weights, Uint8Array), natural = decode(details.natural, Uint16Array);
    const numRows = tree.parents.length, numLayers = map.numbers.length, topK = ids.length / numRows / numLayers;
    const slice = (array, layer, row) => Array.from(array.subarray((layer * numRows + row) * topK, (layer * numRows + row + 1) * topK));
    details.routing = (layer, row) => {
      const shares = slice(weights, layer, row);
      const run = slice(ids, layer, row).map((expert, n) => ({ expert, weight: shares[n] / 255 })).filter(({ weight }) => weight > 0);
      const chosen = natural.length ? slice(natural, layer, row) : run.map(({ expert }) => expert);
      return { run, natural: chosen };
    };
  }
  return details.routing;
}

function selectNode(node) {
  const of = shownFrame && routing(shownFrame);
  selected = { node, rows: null, cell: null,
    experts: of && shownFrame.layers.numbers.map((_, layer) => new Set(of(layer, node).run.map(({ expert }) => expert))) };
  soon();
}
const chooseNode = (node) => hold(shownIndex, (frame) => {
  if (!frame.tree || node >= frame.tree.parents.length) return;
  selectNode(node);
  openCard(treeRoom, `${visible(frame.tree.pieces[node])} · ${isAccepted(frame.tree, node)}`, nodeParts(frame, node));
});

function nodeParts({ tree, details, layers: map }, node) {
  if (!details) return [line("", "No more was recorded of this step.")];
  const place = node === 0 ? 0 : tree.parents[node], piece = node === 0 ? "" : tree.pieces[node];
  const facts = node === 0
    ? line("", "Its token was written by the step before; what could come next:")
    : line("probability", `draft ${percent(Math.exp(tree.draft_logp[node]))}, target ${percent(details.target_p[node])}; ` +
        `rank ${details.draft_top[place].findIndex(([one]) => one === piece) + 1 || "beyond 5"} of the drafter's`);
  const pair = make("div", "mss-pair");
  pair.append(bars("the target's choice here", details.target_top[place], piece), bars("the drafter's guesses here", details.draft_top[place], piece),
    expertTable({ tree, details, layers: map }, node));
  return [facts, pair];
}
function expertTable(frame, node) {
  const of = routing(frame), table = make("table", "mss-experts"), lostCount = frame.tree.missing[node];
  table.append(make("caption", "mss-soft", lostCount ? `Its experts per layer: ${lostCount} dropped, struck out; → stands in their place` : "Its experts per layer, all as its router chose"));
  frame.layers.numbers.forEach((number, layer) => {
    const { run, natural } = of(layer, node), used = new Set(run.map(({ expert }) => expert)), wanted = new Set(natural);
    const row = make("tr"), list = make("td");
    for (const expert of natural) list.append(make(used.has(expert) ? "span" : "del", "", expert), " ");
    for (const { expert } of run.filter(({ expert }) => !wanted.has(expert))) list.append(make("ins", "", `→${expert}`), " ");
    row.append(make("th", "", `layer ${number}`), list);
    table.append(row);
  });
  return table;
}

const chooseCell = (row, expert) => {
  if (spanChoice.value === "answer") {
    const section = describeCell(row, expert).split(": ");
    openCard(heatView, section[0], [line("", section.slice(1).join(": ")), line("", "For its tokens, choose a step.")]);
    return;
  }
  hold(shownIndex, (frame) => {
    const of = routing(frame);
    if (!of) return;
    const rows = frame.tree.parents.map((_, node) => ({ node, ...of(row, node) }));
    const users = rows.filter(({ run }) => run.some((one) => one.expert === expert));
    const denied = rows.filter(({ natural, run }) => natural.includes(expert) && !run.some((one) => one.expert === expert));
    selected = { node: -1, experts: null, cell: { row, expert }, rows: new Set([...users, ...denied].map(({ node }) => node)) };
    const names = (list) => list.map(({ node }) => visible(frame.tree.pieces[node])).join("  ") || "no token of this tree";
    openCard(heatView, `layer ${frame.layers.numbers[row]}, expert ${expert}`, [
      line("", describe(cell(row, expert))), line("used by", names(users)), ...(denied.length ? [line("chosen by, but not run for", names(denied))] : []),
    ]);
    soon();
  });
};
