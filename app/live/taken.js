// What a visitor takes out of the conversation beside the panels, by a copy or into the field where a message is changed,
// is what was written: Gradio hands over what it was told, whose markup is escaped (messages.py).
const ENTITIES = { "&lt;": "<", "&gt;": ">", "&amp;": "&" };
const asWritten = (text) => text.replace(/&(?:lt|gt|amp);/g, (found) => ENTITIES[found]).replaceAll(JOINT, "");
const fieldsSeen = new WeakSet();
let isTaking = false; // while a click in the conversation is handled

function showFieldsAsWritten() {
  for (const field of document.querySelectorAll(`#${props.conversation} textarea`)) {
    if (fieldsSeen.has(field)) continue;
    fieldsSeen.add(field);
    const text = asWritten(field.value);
    if (text === field.value) continue;
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }
}
if (props.conversation) {
  document.addEventListener("click", ({ target }) => {
    if (!(target instanceof Element) || !target.closest(`#${props.conversation}`)) return;
    isTaking = true;
    setTimeout(() => { isTaking = false; showFieldsAsWritten(); });
  }, { capture: true });
  const { clipboard } = navigator;
  if (clipboard) {
    const write = clipboard.writeText.bind(clipboard);
    clipboard.writeText = (text) => write(isTaking ? asWritten(text) : text);
  }
}
