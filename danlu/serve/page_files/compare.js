// Two runs: curves on one pair of axes, and every key of recipe and results that is not the same.
import { by, got, made, options, runPath } from "./ask.js";
import { Curves, draw } from "./curve.js";
import { word } from "./words.js";

let read = new Map();

function flat(told, under, into) {
  for (const [key, one] of Object.entries(told)) {
    if (one !== null && typeof one === "object" && !Array.isArray(one)) flat(one, under + key + ".", into);
    else into.set(under + key, JSON.stringify(one));
  }
  return into;
}

async function curves(name) {
  if (!read.has(name)) read.set(name, new Curves(name));
  await read.get(name).read();
  return read.get(name);
}

export async function show(names) {
  const first = by("compare-first"), second = by("compare-second"), fresh = !first.value;
  options(first, names);
  options(second, names);
  if (fresh && names.length > 1) second.value = names[1];
  if (!first.value) return;
  const both = [first.value, second.value];
  const found = await Promise.all(both.map(curves));
  options(by("compare-key"), [...new Set(found.flatMap((one) => one.keys()))]);
  const key = by("compare-key").value;
  draw(by("compare-curve"), key, found.map((one) => one.series(key)));
  const [one, other] = await Promise.all(both.map(async (name) => {
    const told = await got(runPath(name));
    return flat({ recipe: told.recipe, results: told.results, parameters: told.facts.parameters ?? null, tokenizer: told.facts.tokenizer ?? null }, "", new Map());
  }));
  const differ = [...new Set([...one.keys(), ...other.keys()])].filter((name) => one.get(name) !== other.get(name)).sort();
  const table = by("compare-table"), head = made("tr");
  for (const text of [word("key"), ...both]) { const cell = made("th", text); cell.scope = "col"; head.append(cell); }
  table.replaceChildren(...(differ.length ? [head] : []), ...differ.map((name) => {
    const line = made("tr"), title = made("th", name);
    title.scope = "row";
    line.append(title, made("td", one.get(name) ?? "–"), made("td", other.get(name) ?? "–"));
    return line;
  }));
  if (!differ.length) table.append(made("caption", word("same")));
}
