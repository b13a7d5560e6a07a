// The answer token by token, coloured by what is asked for. Spans are the engine's tokens: nothing is searched for.
const tokensView = find(".mss-tokens"), colouring = find(".mss-colouring"), tokenLegend = find(".mss-token-legend");
const MANY_MISSING = 24; // natural experts missing of the row, over all layers, that colour a token fully
const MOST_TOKENS = 600; // on the page while an answer is written: laying out a long text takes longer with every token
let tokenRun = null, activeToken = -1, firstToken = 0, atEnd = true, toldToken = -1;

const COLOURINGS = {
  origin: { legend: [["mss-guessed", "draft, accepted"], ["mss-own", "the target's own"]] },
  missing: { level: (fact) => Math.min(1, fact.missing / MANY_MISSING), legend: [["mss-level mss-none", "none missing"], ["mss-level mss-full", `${MANY_MISSING} and more`]] },
  confidence: { level: (fact) => fact.draftP || 0, legend: [["mss-level mss-none", "never guessed"], ["mss-level mss-full", "sure of it"]] },
  none: { legend: [] },
};

function colourToken(span, fact) {
  const { level } = COLOURINGS[colouring.value];
  const isKnown = !level || fact.missing !== undefined, active = span.classList.contains("mss-active") ? " mss-active" : "";
  if (level && isKnown) span.style.setProperty("--level", level(fact).toFixed(2));
  else span.style.removeProperty("--level");
  const kind = (!isKnown || colouring.value === "none" ? "" : level ? "mss-level" : fact.origin ? "mss-guessed" : "mss-own") + active;
  if (span.className !== kind) span.className = kind;
}
function recolour() {
  tokenLegend.replaceChildren(...COLOURINGS[colouring.value].legend.map(([kind, text]) => {
    const key = make("i", kind, text);
    key.style.setProperty("--level", kind.includes("full") ? 1 : 0);
    return key;
  }));
  if (tokenRun) colourTokens(firstToken, tokenRun.pieces.length);
}
function colourTokens(from, to) {
  for (let n = Math.max(from, firstToken); n < Math.min(to, firstToken + tokensView.childElementCount); n++) {
    colourToken(tokensView.children[n - firstToken], tokenRun.facts[n]);
  }
  const run = tokenRun, known = run.numLearnt, isAsked = COLOURINGS[colouring.value].level && known < run.pieces.length;
  if (isAsked && !run.isLearning) run.learn().then(() => { if (run === tokenRun) colourTokens(known, run.numLearnt); }, complain);
}
const complain = (error) => setText(messageView, error.message);
colouring.addEventListener("change", recolour);

function tokenSpans(run, from, to) {
  const spans = document.createDocumentFragment();
  for (let n = from; n < to; n++) spans.append(make("span", "", run.pieces[n]));
  return spans;
}

// Only new tokens are added; of those behind the shown step, only the class of a few changes.
function drawTokens(run, index) {
  if (run !== tokenRun) {
    tokensView.replaceChildren();
    tokenRun = run;
    activeToken = -1;
    firstToken = 0;
    atEnd = true;
  }
  const isRunning = view.mode === "follow" && root.dataset.status === "writing";
  if (!isRunning && firstToken) {
    const to = firstToken;
    tokensView.prepend(tokenSpans(run, 0, to));
    firstToken = 0;
    colourTokens(0, to);
  }
  const had = firstToken + tokensView.childElementCount;
  if (run && run.pieces.length > had) {
    tokensView.append(tokenSpans(run, had, run.pieces.length));
    colourTokens(had, run.pieces.length);
  }
  if (isRunning && atEnd && tokensView.childElementCount > MOST_TOKENS) {
    const range = document.createRange(), surplus = tokensView.childElementCount - MOST_TOKENS / 2;
    range.setStart(tokensView, 0);
    range.setEnd(tokensView, surplus);
    range.deleteContents();
    firstToken += surplus;
  }
  markEdge(run && index < run.steps.length - 1 ? run.steps[index].from + run.steps[index].tokens - 1 : -1);
  if (run && run.pieces.length > had && atEnd && index === run.steps.length - 1) tokensView.scrollTop = tokensView.scrollHeight;
}
// Not asked for when new tokens come: it would lay the page out once more.
tokensView.addEventListener("scroll", () => { atEnd = tokensView.scrollTop + tokensView.clientHeight >= tokensView.scrollHeight - 24; });
// Behind the last token of a held step all are faint.
let edge = null;
function markEdge(n) {
  const last = n < 0 ? null : tokensView.children[n - firstToken];
  if (last === edge) return;
  if (edge) edge.removeAttribute("data-edge");
  edge = last;
  if (!last) return;
  last.setAttribute("data-edge", "");
  tokensView.scrollTop = last.offsetTop - tokensView.offsetTop - tokensView.clientHeight / 2;
}

function missingText({ missing, byLayer }) {
  if (!missing) return "no expert missing where it was chosen";
  const places = byLayer.flatMap((count, n) => (count ? [`${count} in layer ${tokenRun.layerNumbers[n] ?? n}`] : []));
  return `${plural(missing, "natural expert")} missing where it was chosen${places.length ? `: ${places.join(", ")}` : ""}`;
}
function describeToken(n) {
  const fact = tokenRun.facts[n], step = tokenRun.stepOf[n];
  const origin = fact.origin ? `drafted at depth ${fact.origin}, accepted` : "the target's own";
  if (fact.missing === undefined) return `${JSON.stringify(tokenRun.pieces[n])}: ${origin}, step ${step}`;
  const p = (value) => (value === null ? "unknown" : percent(value));
  const rank = fact.rank ? `the drafter's guess number ${fact.rank}` : "not among the drafter's guesses";
  return `${JSON.stringify(tokenRun.pieces[n])}: ${origin}, step ${step} · draft ${p(fact.draftP)}, target ${p(fact.targetP)} · ${rank} · ${missingText(fact)}`;
}
// Says what is known of a token, and the rest when it has come.
function tell(n, show) {
  const run = tokenRun;
  toldToken = n;
  show(describeToken(n));
  if (run.facts[n].missing !== undefined) return;
  run.learnStep(run.stepOf[n]).then(() => { if (run === tokenRun && toldToken === n) show(describeToken(n)); }, complain);
}
function choosePlace(n) {
  const before = tokensView.querySelector(".mss-active");
  if (before) before.classList.remove("mss-active");
  activeToken = Math.max(firstToken, Math.min(tokenRun.pieces.length - 1, n));
  const span = tokensView.children[activeToken - firstToken];
  span.classList.add("mss-active");
  span.scrollIntoView({ block: "nearest" });
  tell(activeToken, (text) => { showTip(below(span), text); setText(spoken, text); });
}
// The node that a token was, or the row that chose it.
function goToToken(n) {
  const run = tokenRun, index = run.stepOf[n], place = n - run.steps[index].from;
  hold(index, (frame) => {
    if (!frame.tree) return;
    const path = frame.tree.accepted.flatMap((yes, row) => (yes ? [row] : []));
    selectNode(path[Math.min(place + 1, path.length - 1)]);
  });
}
const placeOf = (target) => (target.parentNode === tokensView ? firstToken + [...tokensView.children].indexOf(target) : -1);
tokensView.addEventListener("pointerover", (event) => {
  const n = placeOf(event.target);
  if (n >= 0) tell(n, (text) => showTip(event, text));
  else untell();
});
function untell() { toldToken = -1; hideTip(); }
tokensView.addEventListener("pointerleave", untell);
tokensView.addEventListener("blur", untell);
tokensView.addEventListener("click", (event) => { const n = placeOf(event.target); if (n >= 0) goToToken(n); });
tokensView.addEventListener("keydown", (event) => {
  if (!tokensView.childElementCount) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) { event.preventDefault(); choosePlace(activeToken < 0 ? tokenRun.pieces.length - 1 : activeToken + step); }
  if (event.key === "Enter" && activeToken >= 0) { event.preventDefault(); untell(); goToToken(activeToken); }
});
