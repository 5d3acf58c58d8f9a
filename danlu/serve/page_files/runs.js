// The list of runs, and the curve of one that grows while it is looked at.
import { by, got, made, options } from "./ask.js";
import { Curves, draw } from "./curve.js";
import { value } from "./tables.js";
import { word } from "./words.js";

let shown = null;

export async function list() { return (await got("/page/runs")).runs; }

function row(run) {
  const item = made("li"), button = made("button", run.name), loss = run.results["eval/loss"];
  button.type = "button";
  button.dataset.run = run.name;
  button.setAttribute("aria-pressed", String(shown !== null && shown.name === run.name));
  const parts = [run.kind, run.began, run.ended ? word("ended") + " " + run.ended : word("running")];
  if (Number.isFinite(loss)) parts.push(word("loss") + " " + loss.toPrecision(4));
  button.append(made("small", parts.filter(Boolean).join(" · ")));
  button.addEventListener("click", () => choose(run.name));
  item.append(button);
  return item;
}

function choose(name) {
  shown = new Curves(name);
  refresh();
}

export function redraw() {
  if (!shown) return;
  options(by("run-key"), shown.keys());
  draw(by("run-curve"), by("run-key").value, [shown.series(by("run-key").value)]);
}

export async function refresh() {
  const runs = await list(), held = document.activeElement && document.activeElement.dataset.run;
  by("runs-none").hidden = runs.length > 0;
  by("runs-list").replaceChildren(...runs.map(row));
  if (held) for (const button of by("runs-list").querySelectorAll("button")) if (button.dataset.run === held) button.focus();
  const run = shown && runs.find((one) => one.name === shown.name);
  by("run-shown").hidden = !run;
  if (!run) return;
  by("run-name").textContent = run.name;
  await shown.read();
  redraw();
  by("run-results").replaceChildren(...[...value(run.results).querySelectorAll(":scope > tbody > tr")]);
}
