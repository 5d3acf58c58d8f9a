"use strict";
const by = (id) => document.getElementById(id);
const say = document.body.dataset;
let models = [], turns = [], stopping = null;

function tell(text) { by("told").textContent = text; }

async function failure(answer) {
  try { return (await answer.json()).error.message; } catch { return answer.status + " " + answer.statusText; }
}

function choose() {
  const model = models.find((one) => one.id === by("model").value);
  const chats = model.offers.includes("chat.completions"), classes = model.offers.includes("classify");
  by("chat").hidden = !chats;
  by("task").hidden = !classes;
  tell(chats || classes ? "" : say.nothing);
  forget();
}

function forget() {
  if (stopping) stopping.abort();
  turns = [];
  by("turns").replaceChildren();
}

function shown(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
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
    const answer = await fetch("/v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, signal: stopping.signal,
      body: JSON.stringify({ model: by("model").value, messages: turns, stream: true }),
    });
    if (!answer.ok) throw new Error(await failure(answer));
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice && choice.delta.content) item.textContent = whole += choice.delta.content;
      if (choice && choice.finish_reason === "length") tell(say.cut);
      if (choice && choice.finish_reason === "content_filter") tell(say.filtered);
      item.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message || say.gone);
  }
  if (whole) mine.push({ role: "assistant", content: whole });
  else { mine.pop(); item.remove(); }
  by("stop").disabled = true;
  stopping = null;
}

async function judge(text) {
  const model = models.find((one) => one.id === by("model").value);
  const head = model.heads.find((one) => one.kind === "classify").name;
  const answer = await fetch("/v1/classify", {
    method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model: model.id, head: head, input: text, top_k: 20 }),
  });
  if (!answer.ok) { tell(await failure(answer)); return; }
  const found = (await answer.json()).data[0];
  const rows = found.top || [{ label: String(found.score), probability: null }];
  by("classes").replaceChildren(...rows.map((one) => {
    const row = document.createElement("tr");
    row.insertCell().textContent = one.label;
    const cell = row.insertCell();
    if (one.probability !== null) {
      const meter = document.createElement("meter");
      meter.value = one.probability;
      meter.setAttribute("aria-label", one.label);
      cell.append(meter);
      row.insertCell().textContent = (100 * one.probability).toFixed(1) + " %";
    }
    return row;
  }));
}

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("say").value;
  if (stopping || !text.trim()) return;
  by("say").value = "";
  tell("");
  converse(text);
});
by("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); by("ask").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && stopping) stopping.abort(); });
by("stop").addEventListener("click", () => stopping && stopping.abort());
by("clear").addEventListener("click", () => { forget(); tell(""); by("say").focus(); });
by("judge").addEventListener("submit", (event) => { event.preventDefault(); tell(""); judge(by("text").value).catch(() => tell(say.gone)); });
by("model").addEventListener("change", choose);

fetch("/v1/models").then((answer) => answer.json()).then((told) => {
  models = told.data;
  by("model").replaceChildren(...models.map((one) => new Option(one.id, one.id)));
  choose();
  (by("chat").hidden ? by("text") : by("say")).focus();
}).catch(() => tell(say.gone));
