// What all panels draw with: crisp canvases, the theme's colours, readable tokens. Knows nothing of frames.
const NATURAL = 1, KEPT = 2, ACTIVE = 4, MASS_STEPS = 8191, SHADES = 32;

const root = element.querySelector(".mss");
const find = (selector) => root.querySelector(selector);
const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Colours come from CSS, so a canvas asks for them again whenever the theme changes.
function readColours() {
  const probe = document.createElement("span");
  root.append(probe);
  const resolve = (colour) => { probe.style.color = colour; return getComputedStyle(probe).color; };
  const shades = [];
  for (let n = 0; n <= SHADES; n++) {
    shades.push(resolve(`color-mix(in oklab, var(--mss-accent) ${(100 * n) / SHADES}%, var(--background-fill-primary))`));
  }
  const colours = { shades, ink: resolve("var(--body-text-color)"), soft: resolve("var(--mss-soft)"),
    line: resolve("var(--mss-line)"), accent: resolve("var(--mss-accent)") };
  probe.remove();
  return colours;
}
let colours = readColours();

// The square root spreads small shares: an expert of a tail is seen beside one of the head.
const shadeOf = (share, most) => colours.shades[Math.round(SHADES * Math.sqrt(Math.min(1, share / (most || 1))))];

// Sizes are told by the browser when it has laid the page out: who asks between two changes has it laid out once more.
const sizes = new WeakMap();
const measured = (part) => { sizes.set(part, { width: part.clientWidth, height: part.clientHeight }); return sizes.get(part); };
const sizing = new ResizeObserver((changes) => changes.forEach(({ target }) => (target.isConnected ? measured(target) : sizing.unobserve(target))));
function sizeOf(part) {
  if (!sizes.has(part)) { measured(part); sizing.observe(part); }
  return sizes.get(part);
}

function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1, { width, height } = sizeOf(canvas);
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "10px system-ui, sans-serif";
  pen.lineWidth = 1;
  pen.textAlign = "start";
  return { pen, width, height };
}
function note(pen, text) {
  pen.fillStyle = colours.soft;
  pen.fillText(text, 8, 24);
}

function hatch(pen, x, y, width, height) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, width, height);
  pen.clip();
  pen.beginPath();
  for (let shift = -height; shift < width; shift += 4) {
    pen.moveTo(x + shift, y + height);
    pen.lineTo(x + shift + height, y);
  }
  pen.strokeStyle = colours.soft;
  pen.lineWidth = 1;
  pen.stroke();
  pen.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
  pen.restore();
}

// Spaces, line ends and control characters are made visible; the text itself is only ever set as text.
const VISIBLE = { " ": "·", "\n": "↵", "\t": "→" };
function visible(piece) {
  return Array.from(piece, (c) => VISIBLE[c] || (c < " " || c === "\x7f" ? "␦" : c)).join("") || "∅";
}
function shorten(text, length) {
  const characters = Array.from(text);
  return characters.length > length ? characters.slice(0, length - 1).join("") + "…" : text;
}
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
function make(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
function setText(view, text) {
  if (view.textContent !== text) view.textContent = text;
}

function decode(packed, Kind) {
  return new Kind(Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)).buffer);
}
