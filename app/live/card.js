// The tip beside the pointer and the card of what is selected. Both are filled with text nodes alone.
const tip = find(".mss-tip"), card = find(".mss-card"), spoken = find(".mss-spoken");
let cardOwner = null;

function showTip(place, text) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = root.getBoundingClientRect();
  tip.style.left = `${Math.max(0, Math.min(place.clientX - box.left + 12, box.width - tip.offsetWidth - 4))}px`;
  tip.style.top = `${place.clientY - box.top + 16}px`;
}
const hideTip = () => showTip(null, "");
// Where a tip stands for something chosen by keyboard.
const below = (view) => { const box = view.getBoundingClientRect(); return { clientX: box.left, clientY: box.bottom - 14 }; };

// The card covers panels that its subject does not mark, and on a narrow page what follows: nothing moves. A node's
// lies over the time line, for the tree and the map show the rest of it; an expert's over the tail.
const sectionOf = (view) => view.closest("section");
function placeCard(owner) {
  const { style } = card, own = sectionOf(owner), isNode = owner === treeRoom;
  const isBelow = root.clientWidth < NARROW || root.dataset.only;
  style.top = isBelow ? `${own.offsetTop + own.offsetHeight}px` : isNode ? "auto" : `${sectionOf(tailView).offsetTop}px`;
  style.bottom = isNode && !isBelow ? `${root.offsetHeight - own.offsetTop}px` : "auto";
}
function openCard(owner, title, parts) {
  const close = make("button", "mss-close", "✕");
  close.type = "button";
  close.setAttribute("aria-label", "Close the details");
  close.addEventListener("click", closeCard);
  const head = make("div", "mss-card-head");
  head.append(make("b", "", title), close);
  card.replaceChildren(head, ...parts);
  card.setAttribute("aria-label", title);
  card.hidden = false;
  placeCard(owner);
  cardOwner = owner;
  setText(spoken, `${title}. ${parts.map((part) => part.textContent).join(". ")}`.slice(0, 600));
}
function closeCard() {
  if (card.hidden) return;
  const hadFocus = card.contains(document.activeElement);
  card.hidden = true;
  if (cardOwner && hadFocus) cardOwner.focus();
  cardOwner = null;
  unselect();
}
root.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !card.hidden) { event.stopPropagation(); closeCard(); }
});

function line(label, text) {
  const row = make("p", "mss-card-line");
  row.append(make("span", "mss-soft", label), document.createTextNode(` ${text}`));
  return row;
}
function bars(title, alternatives, chosen) {
  const list = make("div", "mss-bars");
  list.append(make("span", "mss-soft", title));
  for (const [piece, p] of alternatives) {
    const row = make("div", piece === chosen ? "mss-bar mss-chosen" : "mss-bar");
    const bar = make("i");
    bar.style.width = `${Math.max(1, 100 * p)}%`;
    row.append(make("code", "", shorten(visible(piece), 14)), bar, make("span", "", percent(p)));
    list.append(row);
  }
  if (!alternatives.length) list.append(make("p", "mss-soft", "not recorded"));
  return list;
}
