// Any JSON as tables of keys and values; audit and plan of a run.
import { by, got, made, options, runPath, tell } from "./ask.js";
import { word } from "./words.js";

const MOST = 500, DEEP = 12;

export function value(told, deep = 0) {
  if (told === null || typeof told !== "object") return made("span", told === null ? "–" : typeof told === "number" ? String(+told.toPrecision(6)) : String(told));
  const pairs = Object.entries(told);
  if (!pairs.length || deep >= DEEP) return made("span", pairs.length ? JSON.stringify(told).slice(0, 2000) : "–");
  if (Array.isArray(told) && told.every((one) => one === null || typeof one !== "object")) return made("span", told.slice(0, MOST).join(", "));
  const table = made("table");
  for (const [key, one] of pairs.slice(0, MOST)) {
    const row = table.insertRow(), head = made("th", Array.isArray(told) ? String(+key + 1) : key);
    head.scope = "row";
    row.append(head);
    row.insertCell().append(value(one, deep + 1));
  }
  if (pairs.length > MOST) table.insertRow().insertCell().textContent = "… " + (pairs.length - MOST);
  return table;
}

export async function show(kind, names) {
  options(by(kind + "-run"), names);
  const place = by(kind + "-table"), name = by(kind + "-run").value;
  place.replaceChildren();
  if (!name) { tell(word("none")); return; }
  const { tables } = await got(runPath(name));
  if (!tables.includes(kind)) { place.replaceChildren(made("p", word("notable"))); return; }
  place.replaceChildren(value(await got(runPath(name, kind))));
}
