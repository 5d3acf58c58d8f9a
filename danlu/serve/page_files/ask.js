// What the page asks of the server, and where it says what went wrong.  All text becomes text nodes, never HTML.
import { word } from "./words.js";

export const by = (id) => document.getElementById(id);

export function tell(text) { by("told").textContent = text; }

export function made(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

export function options(select, names) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(before)) select.value = before;
}

export async function asked(path, body, signal) {
  const how = body === undefined ? { signal } : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  };
  let answer;
  try { answer = await fetch(path, how); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(word("gone"));
  }
  if (answer.ok) return answer;
  let why = answer.status + " " + answer.statusText;
  try { why = (await answer.json()).error.message; } catch { /* no JSON: the status says it */ }
  throw new Error(why);
}

export async function got(path, body) { return (await asked(path, body)).json(); }

export function guarded(work) {
  return (...given) => Promise.resolve(work(...given)).catch((error) => { if (error.name !== "AbortError") tell(error.message); });
}

export const runPath = (name, part) => "/page/runs/" + encodeURIComponent(name) + (part ? "/" + part : "");
