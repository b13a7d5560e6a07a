// A tab keeps its conversation under a name of its own, so that two tabs of one visitor take nothing from each other. A
// new tab begins with a copy of the newest conversation. One that is deleted leaves an empty one behind, so that no
// other comes in its place, and takes along what it began with, but not of a tab that is still open: that one holds the
// lock of its name. Where a browser has no locks (http, but on one's own machine), what it began with stays.
const PREFIX = "moe-spec-studio/", MAX_KEPT = 8, MAX_CHARACTERS = 400000;
let newest = []; // messages of this tab
const read = (key) => { try { return JSON.parse(localStorage.getItem(key)); } catch { return null; } };
const keys = () => Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
const byAge = () => keys().map((key) => [key, (read(key) || {}).at || 0]).sort((a, b) => b[1] - a[1]).map(([key]) => key);

function ownKey() {
  let name = sessionStorage.getItem(PREFIX);
  if (!name) sessionStorage.setItem(PREFIX, (name = PREFIX + crypto.getRandomValues(new Uint32Array(2)).join("-")));
  return name;
}

const beginsWith = (messages, first) => messages.length >= first.length && JSON.stringify(messages.slice(0, first.length)) === JSON.stringify(first);
function forget() {
  for (const other of keys().filter((key) => key !== ownKey())) {
    const kept = (read(other) || {}).messages;
    if (!navigator.locks || !Array.isArray(kept) || !kept.length || !beginsWith(newest, kept)) continue;
    navigator.locks.request(other, { ifAvailable: true }, (lock) => { if (lock) localStorage.removeItem(other); }).catch(() => {});
  }
  newest = [];
  localStorage.setItem(ownKey(), JSON.stringify({ at: Date.now(), messages: [] }));
}
function keep({ messages, settings, isCut }) {
  if (!messages) return;
  if (!messages.length) { forget(); return; }
  newest = messages;
  let kept = messages;
  while (kept.length > 2 && JSON.stringify(kept).length > MAX_CHARACTERS) kept = kept.slice(2);
  for (const old of byAge().filter((key) => key !== ownKey()).slice(MAX_KEPT - 1)) localStorage.removeItem(old);
  const text = JSON.stringify({ at: Date.now(), messages: kept, settings, isCut });
  while (true) {
    try { localStorage.setItem(ownKey(), text); return; } catch {
      const oldest = byAge().filter((key) => key !== ownKey()).at(-1);
      if (!oldest) return; // the browser keeps nothing: the page works without
      localStorage.removeItem(oldest);
    }
  }
}

// A blocked or full storage must not break the page.
try {
  let source = ownKey(), found = read(source);
  if (!found) found = read((source = byAge()[0] || ""));
  if (navigator.locks) navigator.locks.request(ownKey(), () => new Promise(() => {})).catch(() => {});
  if (found && Array.isArray(found.messages) && found.messages.length) {
    newest = found.messages;
    trigger("restored", { messages: found.messages, settings: found.settings || {}, isCut: found.isCut === true && source === ownKey() });
  }
} catch (error) { console.info("nothing is kept in this browser:", error.message); }
watch("value", () => { try { keep(props.value || {}); } catch (error) { console.info("nothing is kept:", error.message); } });
