// A conversation, streamed.
import { asked, by, made, tell } from "./ask.js";
import { word } from "./words.js";

let turns = [], stopping = null;

export function stop() { if (stopping) stopping.abort(); }

export function forget() {
  stop();
  turns = [];
  by("turns").replaceChildren();
}

function shown(role, text) {
  const item = made("li", text, role);
  by("turns").append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function converse(text) {
  turns.push({ role: "user", content: text });
  shown("user", text);
  const item = shown("assistant", ""), mine = turns;
  let whole = "";
  stopping = new AbortController();
  by("stop").disabled = false;
  try {
    const answer = await asked("/v1/chat/completions", { model: by("chat-model").value, messages: turns, stream: true }, stopping.signal);
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice && choice.delta.content) item.textContent = whole += choice.delta.content;
      if (choice && choice.finish_reason === "length") tell(word("cut"));
      if (choice && choice.finish_reason === "content_filter") tell(word("filtered"));
      item.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message || word("gone"));
  }
  if (whole) mine.push({ role: "assistant", content: whole });
  else { mine.pop(); item.remove(); }
  by("stop").disabled = true;
  stopping = null;
}

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("say").value;
  if (!by("chat-model").value) { tell(word("nothing")); return; }
  if (stopping || !text.trim()) return;
  by("say").value = "";
  tell("");
  converse(text);
});
by("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); by("ask").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
by("stop").addEventListener("click", stop);
by("clear").addEventListener("click", () => { forget(); tell(""); by("say").focus(); });
by("chat-model").addEventListener("change", forget);
