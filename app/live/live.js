// Takes frames (see live.py) and hands them to the panels, at most once per animation frame.
const tokensView = find(".mss-tokens"), messageView = find(".mss-message");
const SEPARATOR = "\x1f";
let shown = { tokens: "", count: 0 }, waiting = false, panels = {};

function figure(name, text) {
  const view = find(`[data-figure="${name}"]`);
  if (view.textContent !== text) view.textContent = text;
}
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function drawFigures({ figures, settings }) {
  if (!figures) {
    for (const name of ["tokens_per_s", "accepted", "experts", "mass", "lossless"]) figure(name, "–");
    figure("force", "against the target alone");
    return;
  }
  figure("tokens_per_s", number(figures.tokens_per_s, 1));
  figure("accepted", number(figures.accepted, 2));
  figure("experts", figures.natural === null ? "–" : `${number(figures.natural, 1)} → ${number(figures.active, 1)}`);
  figure("mass", figures.mass === null ? "–" : percent(figures.mass));
  figure("lossless", figures.lossless ? "lossless" : "lossy");
  const budget = settings.coverage !== null ? `coverage ${settings.coverage}` : `budget ${settings.budget}`;
  const free = settings.budget === null && settings.coverage === null;
  figure("force", free ? "no budget at this step" : `${budget}, ${settings.policy}`);
}

// Only new tokens are added: a long answer costs no more at its end than at its start.
function drawTokens(tokens, origins) {
  const atEnd = tokensView.scrollTop + tokensView.clientHeight >= tokensView.scrollHeight - 24;
  if (!tokens.startsWith(shown.tokens)) {
    tokensView.replaceChildren();
    shown = { tokens: "", count: 0 };
  }
  const pieces = tokens.slice(shown.tokens.length).split(SEPARATOR).slice(0, -1);
  for (const piece of pieces) {
    const span = document.createElement("span"), depth = parseInt(origins[shown.count++], 17);
    span.textContent = piece;
    span.className = depth ? "mss-guessed" : "mss-own";
    span.title = depth ? `drafted at depth ${depth}, accepted` : "the target's own";
    tokensView.append(span);
  }
  shown.tokens = tokens;
  if (pieces.length && atEnd) tokensView.scrollTop = tokensView.scrollHeight;
}

function draw() {
  waiting = false;
  const frame = props.value || {};
  root.dataset.status = frame.status || "idle";
  root.dataset.step = frame.figures ? frame.figures.step : "";
  root.dataset.budget = frame.settings ? String(frame.settings.budget) : "";
  if (messageView.textContent !== (frame.message || "")) messageView.textContent = frame.message || "";
  // A notice leaves the last answer's panels, which a new size or theme draws again.
  if (frame.figures || frame.status === "idle") panels = frame;
  drawTokens(panels.tokens || "", panels.origins || "");
  drawFigures(panels);
  drawTree(panels.tree);
  drawLayers(panels.layers);
}
function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(draw);
}
watch("value", soon);
new ResizeObserver(soon).observe(root);
const themed = () => { colours = readColours(); soon(); };
new MutationObserver(themed).observe(document.body, { attributes: true, attributeFilter: ["class"] });
soon();
