// The draft tree: one column per depth, leaves evenly spaced, parents in the middle of their children.
const SVG = "http://www.w3.org/2000/svg";
const treeView = find(".mss-tree");

function svgChild(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function leafSlots(parents) {
  const children = parents.map(() => []);
  parents.forEach((parent, node) => { if (parent >= 0) children[parent].push(node); });
  const slot = new Array(parents.length).fill(0);
  let numLeaves = 0;
  const place = (node) => {
    if (!children[node].length) { slot[node] = numLeaves++; return; }
    children[node].forEach(place);
    slot[node] = (slot[children[node][0]] + slot[children[node].at(-1)]) / 2;
  };
  place(0);
  return { slot, numLeaves };
}

function drawTree(tree) {
  treeView.replaceChildren();
  if (!tree) {
    svgChild(treeView, "text", { x: 8, y: 24, class: "mss-note" }, "The tree of guesses of each step will appear here.");
    return;
  }
  const width = treeView.clientWidth, height = treeView.clientHeight;
  const { slot, numLeaves } = leafSlots(tree.parents);
  const columns = Math.max(...tree.depths) + 1;
  const columnWidth = Math.min(175, width / columns), pitch = Math.min(30, (height - 8) / numLeaves);
  const boxWidth = columnWidth - 18, boxHeight = Math.min(22, Math.max(8, pitch - 4));
  const top = (height - pitch * numLeaves) / 2;
  const x = (node) => tree.depths[node] * columnWidth + 4;
  const y = (node) => top + (slot[node] + 0.5) * pitch;
  tree.parents.forEach((parent, node) => {
    if (parent < 0) return;
    const from = x(parent) + boxWidth, middle = (from + x(node)) / 2;
    const line = `M${from},${y(parent)}C${middle},${y(parent)} ${middle},${y(node)} ${x(node)},${y(node)}`;
    svgChild(treeView, "path", { d: line, class: tree.accepted[node] ? "mss-on" : "" });
  });
  const size = Math.min(11, boxHeight), letters = Math.max(2, Math.floor((boxWidth - 8) / (0.62 * size)));
  tree.pieces.forEach((piece, node) => {
    const kind = node === 0 ? "mss-root" : tree.accepted[node] ? "mss-on" : "";
    const group = svgChild(treeView, "g", { class: kind, transform: `translate(${x(node)},${y(node)})` });
    const round = node === 0 ? boxHeight / 2 : 3;
    svgChild(group, "rect", { x: 0, y: -boxHeight / 2, width: boxWidth, height: boxHeight, rx: round });
    const logp = node === 0 ? "" : tree.draft_logp[node].toFixed(2).replace("-", "−");
    const missing = tree.missing[node] ? ` −${tree.missing[node]}` : "";
    const note = boxWidth > 84 ? logp + (missing && ` ·${missing}`) : "";
    const room = note ? letters - Math.ceil(note.length * 0.82) - 1 : letters;
    svgChild(group, "text", { x: 5, y: 0.35 * size, style: `font-size:${size}px` }, shorten(visible(piece), Math.max(2, room)));
    if (note) {
      svgChild(group, "text", { x: boxWidth - 4, y: 3, class: "mss-note", "text-anchor": "end" }, note);
    }
    svgChild(group, "title", {}, node === 0
      ? `root: the last committed token ${JSON.stringify(piece)}`
      : `${JSON.stringify(piece)}: log-probability ${logp}, ${tree.accepted[node] ? "accepted" : "rejected"}, ` +
        `${tree.missing[node]} natural experts missing over all layers`);
  });
  const held = tree.accepted.reduce((sum, yes) => sum + yes, 0) - 1;
  treeView.setAttribute("aria-label", `Draft tree of ${tree.parents.length - 1} guesses, ${held} accepted.`);
}
