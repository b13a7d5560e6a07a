// The draft tree. Where there is room, one column per depth: the likeliest line straight on top, its rivals below. On a
// narrow page, one node per line, indented. Columns and lines stay where they are from step to step.
const SVG = "http://www.w3.org/2000/svg";
const treeView = find(".mss-tree"), treeRoom = find(".mss-tree-room");
const NARROW = 520, PITCHES = [36, 26, 21, 18, 15], MIN_COLUMN = 62;
let drawnTree = null, nodeViews = [], mostLeaves = 0;

function svgChild(parent, name, className) {
  const node = document.createElementNS(SVG, name);
  if (className) node.setAttribute("class", className);
  parent.append(node);
  return node;
}
function setAttributes(node, attributes) {
  for (const key in attributes) {
    const value = String(attributes[key]);
    if (node.getAttribute(key) !== value) node.setAttribute(key, value);
  }
}

const childrenOf = (parents) => {
  const children = parents.map(() => []);
  parents.forEach((parent, node) => { if (parent >= 0) children[parent].push(node); });
  return children;
};
// line[node]: its row on the page. A first child goes straight on, each further one below all that came before.
function treeLines(parents, isOutline) {
  const children = childrenOf(parents), rows = new Array(parents.length).fill(0);
  let next = 0;
  const place = (node) => {
    rows[node] = next;
    children[node].forEach((child, n) => {
      if (n || isOutline) next += 1;
      place(child);
    });
  };
  place(0);
  return { rows, count: next + 1 };
}

function treeLayout(tree) {
  const { width, height: room } = sizeOf(treeRoom), isOutline = width < NARROW;
  const { rows, count } = treeLines(tree.parents, isOutline);
  mostLeaves = Math.max(mostLeaves, count);
  if (isOutline) {
    return { isOutline, rows, width, boxWidth: 132, boxHeight: 15, pitch: 18, height: Math.max(room, count * 18 + 4), x: (node) => 3 + tree.depths[node] * 14 };
  }
  const columns = Math.max(...tree.depths, (view.asked && view.asked[1]) || 0) + 1;
  const column = Math.max(MIN_COLUMN, Math.min(118, width / columns));
  const pitch = PITCHES.find((one) => one * mostLeaves <= room - 4) || PITCHES.at(-1);
  return { isOutline, rows, width: Math.max(width, column * (Math.max(...tree.depths) + 1)), boxWidth: column - 16, boxHeight: pitch > 30 ? 29 : Math.min(20, pitch - 3), pitch,
    height: Math.max(room, count * pitch + 4), x: (node) => 3 + tree.depths[node] * column };
}

function nodeView(n) {
  if (!nodeViews[n]) {
    const path = svgChild(treeView, "path");
    const group = svgChild(treeView, "g");
    group.dataset.node = n;
    nodeViews[n] = { path, group, rect: svgChild(group, "rect"), text: svgChild(group, "text"), note: svgChild(group, "text", "mss-note") };
  }
  return nodeViews[n];
}

function drawTree(tree) {
  drawnTree = tree;
  treeView.classList.toggle("mss-empty", !tree);
  treeView.dataset.note = tree ? "" : "The tree of guesses of each step will appear here.";
  nodeViews.forEach((one, n) => {
    const isUsed = tree && n < tree.parents.length;
    one.group.style.display = one.path.style.display = isUsed ? "" : "none";
  });
  if (!tree) return;
  const layout = treeLayout(tree), { boxWidth, boxHeight, pitch } = layout, size = Math.min(11, boxHeight - 3), isTall = boxHeight > 24;
  setAttributes(treeView, { width: layout.width, height: layout.height });
  const y = (node) => 2 + (layout.rows[node] + 0.5) * pitch;
  tree.parents.forEach((parent, node) => {
    const drawn = nodeView(node), isOn = tree.accepted[node], x = layout.x(node);
    setAttributes(drawn.path, { d: parent < 0 ? "" : branch(layout, parent, node, y), class: isOn ? "mss-on" : "" });
    const kind = node === 0 ? "mss-root" : isOn ? "mss-on" : "mss-off";
    const marks = `${node === selected.node ? " mss-selected" : ""}${selected.rows && selected.rows.has(node) ? " mss-user" : ""}`;
    setAttributes(drawn.group, { class: kind + marks, transform: `translate(${x},${y(node)})` });
    setAttributes(drawn.rect, { x: 0, y: -boxHeight / 2, width: boxWidth, height: boxHeight, rx: node === 0 ? boxHeight / 2 : isOn ? 3 : 0 });
    labelNode(drawn, tree, node, layout, size, isTall);
  });
  const held = tree.accepted.reduce((sum, yes) => sum + yes, 0) - 1;
  setAttributes(treeView, { "aria-label": `Draft tree of ${tree.parents.length - 1} guessed, ${held} accepted.` });
}
function branch(layout, parent, node, y) {
  if (layout.isOutline) {
    const x = layout.x(parent) + 6;
    return `M${x},${y(parent) + layout.boxHeight / 2}V${y(node)}H${layout.x(node)}`;
  }
  const from = layout.x(parent) + layout.boxWidth, to = layout.x(node), middle = (from + to) / 2;
  return y(parent) === y(node) ? `M${from},${y(node)}H${to}` : `M${from},${y(parent)}C${middle},${y(parent)} ${middle},${y(node)} ${to},${y(node)}`;
}
// Beside its text where there is room, or below it, a node says how likely it was and what it misses.
function labelNode(drawn, tree, node, layout, size, isTall) {
  const digits = isTall && layout.boxWidth < 74 ? 1 : 2, logp = node === 0 ? "" : tree.draft_logp[node].toFixed(digits).replace("-", "−");
  const missing = tree.missing[node] ? `−${tree.missing[node]}` : "", isBeside = layout.boxWidth > 84 && !layout.isOutline && !isTall;
  const text = isBeside || layout.isOutline || isTall ? [logp, missing].filter(Boolean).join(digits === 1 ? " " : " · ") : "";
  const left = node === 0 && !layout.isOutline ? 9 : 5;
  const letters = Math.floor((layout.boxWidth - left - 3) / (0.62 * size)) - (isBeside ? Math.ceil(text.length * 0.82) + 1 : 0);
  setAttributes(drawn.text, { x: left, y: isTall ? -2 : 0.35 * size, style: `font-size:${size}px` });
  setText(drawn.text, shorten(visible(tree.pieces[node]), Math.max(3, letters)));
  const place = layout.isOutline ? [layout.boxWidth + 6, 3, "start"] : isTall ? [left, 10, "start"] : [layout.boxWidth - 4, 3, "end"];
  setAttributes(drawn.note, { x: place[0], y: place[1], "text-anchor": place[2] });
  setText(drawn.note, text);
}

const isAccepted = (tree, node) => (node === 0 ? "root: the last committed token" : tree.accepted[node] ? "accepted" : "rejected");
function describeNode(tree, node) {
  const logp = node === 0 ? "" : `, draft ${percent(Math.exp(tree.draft_logp[node]))}`;
  return `${JSON.stringify(tree.pieces[node])}: ${isAccepted(tree, node)}${logp}, ${plural(tree.missing[node], "natural expert")} missing over all layers`;
}
const nodeAt = (event) => {
  const group = event.target.closest && event.target.closest("g[data-node]");
  return group ? Number(group.dataset.node) : -1;
};
treeRoom.addEventListener("pointermove", (event) => {
  const node = nodeAt(event);
  showTip(event, drawnTree && node >= 0 && node < drawnTree.parents.length ? describeNode(drawnTree, node) : "");
});
treeRoom.addEventListener("pointerleave", hideTip);
treeRoom.addEventListener("click", (event) => { const node = nodeAt(event); if (node >= 0) chooseNode(node); });
treeRoom.addEventListener("keydown", (event) => {
  if (!drawnTree) return;
  if (event.key === "Enter" && selected.node >= 0) { event.preventDefault(); chooseNode(selected.node); return; }
  const next = neighbour(drawnTree, Math.max(0, selected.node), event.key);
  if (next === undefined) return;
  event.preventDefault();
  selectNode(selected.node < 0 ? 0 : next);
  setText(spoken, describeNode(drawnTree, selected.node));
});
function neighbour(tree, node, key) {
  const children = childrenOf(tree.parents), siblings = node ? children[tree.parents[node]] : [0];
  const at = siblings.indexOf(node), within = (n) => siblings[Math.max(0, Math.min(siblings.length - 1, n))];
  return { ArrowRight: children[node][0] ?? node, ArrowLeft: Math.max(0, tree.parents[node]), ArrowDown: within(at + 1), ArrowUp: within(at - 1) }[key];
}
