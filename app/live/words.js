// Writes the words of an answer that is being written into the conversation beside the panels. Gradio lays a conversation
// out anew whenever it is told of new text, which takes a browser as long as drawing several steps: it is told rarely
// (answering.py), and what came since is put here into the very text that shows it. Owns nothing of that conversation:
// where its answer is no single text (Markdown, for one), it waits for Gradio.
const JOINT = "\u2060"; // as messages.py has it between the two
// Before what Gradio was told a moment ago is painted over what is known here.
const overwritten = new MutationObserver(() => writeWords());
let conversation = null, isAtEnd = true, before = { top: 0, height: 0 };

function findConversation() {
  conversation = document.getElementById(props.conversation);
  overwritten.disconnect();
  if (!conversation) return; // it comes later
  overwritten.observe(conversation, { childList: true, characterData: true, subtree: true });
  conversation.addEventListener("scroll", ({ target }) => {
    if (!target.matches(".bubble-wrap")) return;
    const { scrollTop: top, scrollHeight: height, clientHeight } = target;
    if (top < before.top && height >= before.height) isAtEnd = false; // somebody looks further up
    else if (top + clientHeight >= height - 24) isAtEnd = true;
    before = { top, height };
  }, { capture: true, passive: true });
}
// The text of the conversation's last message, if it is an answer's.
function answerText() {
  const rows = conversation.querySelectorAll(".message-row"), last = rows[rows.length - 1];
  const part = last && last.classList.contains("bot-row") ? last.querySelector(".md") : null;
  const texts = part ? [...part.childNodes].filter((node) => node.nodeType !== Node.COMMENT_NODE) : [];
  return texts.length === 1 && texts[0].nodeType === Node.TEXT_NODE ? texts[0] : null;
}
function writeWords() {
  if (!props.conversation || !newestRun || root.dataset.status !== "writing") return;
  if (!conversation || !conversation.isConnected) findConversation();
  const shown = conversation && answerText(), text = newestRun.text.replaceAll("![", `!${JOINT}[`);
  if (shown && shown.length < text.length && text.startsWith(shown.data)) shown.appendData(text.slice(shown.length));
}
function scrollWords() {
  const room = conversation && isAtEnd && root.dataset.status === "writing" && conversation.querySelector(".bubble-wrap");
  if (room) room.scrollTop = room.scrollHeight;
}
