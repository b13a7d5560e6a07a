// Asks for an answer's steps while it is written. Owns how often, what to make of no reply, and where new steps belong;
// live.js shows them.
// Between two questions: where each brings a step; where it brings several, or as many times what drawing takes; at the most.
// Longer and longer where nothing comes. A reply is waited for so long, another try comes so much later, so many at an end.
const LISTEN_MS = [40, 80, 200], DRAWN_SHARE = 4, PATIENCE_MS = 20000, LOST_MS = 1000, MOST_LOST = 5;
// Whose steps are asked for; what its event says, kept until its steps are here; ends the rest between two questions.
let heard = null, told = null, wake = () => {};

// Asks for an answer's steps as they are made, from when it is waited for, and once more when it has ended: one that failed
// has no last frame. The event that writes it tells the rest (routes.py), which is said with the drawing of the steps.
async function listen(id) {
  if (heard && heard.id === id) return;
  const own = { id }, run = runs.get(id) || new Run(id, source);
  heard = own;
  for (let numInVain = 0, numLost = 0; heard === own;) {
    const began = performance.now(), had = run.steps.length, isOver = !isWriting(), isAsleep = document.hidden && !isOver;
    const added = isAsleep ? null : await addedTo(id, had), isLost = !added && !isAsleep;
    if (heard !== own) break;
    if (added && added.series) hear(run, added);
    numLost = isLost ? numLost + 1 : 0;
    numInVain = run.steps.length > had ? 0 : numInVain + 1;
    const isEnd = isLost ? isOver && numLost >= MOST_LOST : !isAsleep && (isOver || added.is_end);
    if (told && (isEnd || (runs.has(id) && told.status === "writing"))) { due = told; told = null; soon(); }
    if (isEnd) break;
    if (isWriting() === isOver) continue; // told meanwhile
    const least = Math.max(LISTEN_MS[run.steps.length - had > 1 ? 1 : 0], DRAWN_SHARE * drawMs);
    const rest = isLost ? LOST_MS : Math.min(LISTEN_MS[2], least * 1.2 ** numInVain) - (performance.now() - began);
    await new Promise((done) => { wake = done; setTimeout(done, Math.max(0, rest)); });
  }
  if (heard === own) heard = null;
  else if (heard && !run.isWhole) { // the next was asked for before the last steps of this one were here
    const next = heard, added = await addedTo(id, run.steps.length);
    if (added && added.series && (runs.get(id) === run || (heard === next && !runs.has(next.id)))) hear(run, added);
  }
}
const isWriting = () => ["waiting", "writing"].includes((told || due || root.dataset).status);
// What is new of an answer behind its first steps; an end where it is no longer kept, null where there is no reply.
async function addedTo(id, first) {
  try {
    const response = await fetch(`live/${id}?after=${first}`, { signal: AbortSignal.timeout(PATIENCE_MS) });
    return response.ok ? await response.json() : response.status === 404 ? { is_end: true } : null;
  } catch { return null; }
}

// What is new of an answer.
function hear(run, added) {
  if (added.first !== run.steps.length) return;
  run.extend(added);
  run.isWhole = added.is_end;
  cutArrived(added.now);
  soon();
  if (runs.has(run.id)) return;
  if (newestRun && newestRun.isRecording) forgetRuns(); // ours makes room for theirs
  run.title = `answer ${runs.size + 1}`;
  begin(run, {});
  if (heard && heard.id === run.id && root.dataset.status === "waiting") due = { status: "writing" }; // before its event says so
}
