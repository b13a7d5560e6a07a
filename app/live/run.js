// An answer as the panels know it: its tokens with their facts, its time line, the frames of its steps as far as they
// have come. Decodes what frames.py writes; asks `source` for steps that were passed over, and for facts that are looked
// at. Knows nothing of drawing.
const SEPARATOR = "\x1f", MOST = 36 * 36 - 1, MAX_FRAMES = 400, BLOCK = 32;
const SERIES = ["kind", "tokens", "accepted", "natural", "active", "mass", "draft", "verify", "other", "budget", "lossless"];

const probability = (digits) => (digits === "00" ? null : (parseInt(digits, 36) - 1) / (MOST - 1));
const readFacts = (text) => ({
  origin: parseInt(text[0], 36), missing: parseInt(text.slice(1, 3), 36), draftP: probability(text.slice(3, 5)),
  targetP: probability(text.slice(5, 7)), rank: parseInt(text[7], 36), byLayer: [...text.slice(8)].map((digit) => parseInt(digit, 36)),
});

function readStep(text, before) {
  const values = text.split(","), step = { kind: values[0], budget: values[9] === "" ? null : Number(values[9]) };
  SERIES.forEach((name, n) => { if (!(name in step)) step[name] = Number(values[n]); });
  const isDecoded = step.kind !== "pr", isTree = step.kind === "tr";
  // Sums so far: the figures of any step are then one division away.
  const sums = before ? { ...before.sums } : { steps: 0, tokens: 0, accepted: 0, ms: 0, trees: 0, natural: 0, active: 0, mass: 0 };
  step.from = before ? before.from + before.tokens : 0; // its first token's place in the answer
  if (isDecoded) {
    sums.steps += 1; sums.tokens += step.tokens; sums.accepted += step.accepted;
    sums.ms += step.draft + step.verify + step.other;
  }
  if (isTree) {
    sums.trees += 1; sums.natural += step.natural; sums.active += step.active; sums.mass += step.mass;
  }
  step.sums = sums;
  return step;
}

function readFrame({ step, settings, tree, layers, details }) {
  return { step, settings, details, tree: tree && readTree(tree), layers: layers && { ...layers,
    numbers: layers.numbers.split(",").map(Number), mass_kept: layers.mass_kept.split(",").map(Number) } };
}
function readTree({ pieces, nodes }) {
  const tree = { pieces: pieces.split(SEPARATOR).slice(0, -1), parents: [], depths: [], draft_logp: [], accepted: [], missing: [] };
  for (const node of nodes.split(";")) {
    const [parent, logp, accepted, missing] = node.split(",").map(Number);
    tree.parents.push(parent);
    tree.depths.push(parent < 0 ? 0 : tree.depths[parent] + 1);
    tree.draft_logp.push(logp);
    tree.accepted.push(accepted);
    tree.missing.push(missing);
  }
  return tree;
}

class Run {
  // source: { steps(id, first, last), facts(id, first, last), soFar(id, last) }, all promises; title: its name in a list.
  // facts: of tokens behind the first `numLearnt`, their origin alone.
  constructor(id, source, title) {
    Object.assign(this, { id, source, title, layerNumbers: [], pieces: [], text: "", facts: [], steps: [], stepOf: [], frames: new Map(), asked: new Map(), numLearnt: 0, isLearning: false, isWhole: false });
    this.drawnIndex = -1; // the newest step that is worth drawing
  }

  // What comes after what is known.
  extend({ tokens, text, origins, series, now }) {
    this.pieces.push(...tokens.split(SEPARATOR).slice(0, -1));
    this.text += text || "";
    this.facts.push(...[...origins].map((digit) => ({ origin: parseInt(digit, 36) })));
    for (const entry of series.split(";").slice(0, -1)) {
      const step = readStep(entry, this.steps.at(-1));
      for (let n = 0; n < step.tokens; n++) this.stepOf.push(this.steps.length);
      this.steps.push(step);
    }
    if (!now) return;
    this.keep(now.step, now);
    this.drawnIndex = now.step;
  }

  // All facts so far, or a step's. Making them takes time from an answer that is being written: only for who looks at them.
  async learn() {
    this.isLearning = true; // for good, where it fails
    while (this.numLearnt < this.pieces.length) {
      const first = this.stepOf[this.numLearnt], num = await this.askForFacts(first, this.steps.length);
      if (!num) return;
      this.numLearnt = this.steps[first].from + num;
    }
    this.isLearning = false;
  }
  learnStep(index) { return this.askForFacts(index, index + 1); }
  async askForFacts(first, last) {
    const facts = await this.source.facts(this.id, first, last), from = this.steps[first].from;
    facts.forEach((text, n) => { this.facts[from + n] = readFacts(text); });
    return facts.length;
  }

  keep(index, frame) {
    const known = readFrame(frame);
    if (known.layers) this.layerNumbers = known.layers.numbers;
    this.frames.set(index, known);
    if (this.frames.size > MAX_FRAMES) this.frames.delete(this.frames.keys().next().value);
  }

  figures(index) {
    const step = this.steps[index];
    if (!step) return null;
    const { sums } = step, mean = (sum, count) => (count ? sum / count : null);
    return {
      tokensPerS: sums.ms ? (1000 * sums.tokens) / sums.ms : null, accepted: mean(sums.accepted, sums.steps),
      natural: mean(sums.natural, sums.trees), active: mean(sums.active, sums.trees), mass: mean(sums.mass, sums.trees),
      lossless: Boolean(step.lossless),
    };
  }

  // A step's frame with its details; comes in blocks, for the next ones are asked for soon.
  async detailed(index) {
    const known = this.frames.get(index);
    if (known && (known.details || !known.layers)) return known;
    const first = index - (index % BLOCK), last = Math.min(first + BLOCK, this.steps.length), key = `${first}-${last}`;
    if (!this.asked.has(key)) this.asked.set(key, this.source.steps(this.id, first, last));
    try {
      const frames = await this.asked.get(key);
      frames.forEach((frame, n) => this.keep(first + n, frame));
    } finally {
      this.asked.delete(key);
    }
    return this.frames.get(index);
  }
}
