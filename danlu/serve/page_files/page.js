// The page begins here: language, tabs, what each tab shows when it is opened, and what grows while it is looked at.
import { by, got, guarded, options, tell } from "./ask.js";
import "./chat.js";
import { know } from "./classify.js";
import * as compare from "./compare.js";
import * as runs from "./runs.js";
import * as tables from "./tables.js";
import * as tabs from "./tabs.js";
import { learn, speak } from "./words.js";

const EVERY = 1000;
let current = "runs", busy = false;

const names = async () => (await runs.list()).map((run) => run.name);
const shows = {
  runs: runs.refresh,
  compare: async () => compare.show(await names()),
  audit: async () => tables.show("audit", await names()),
  plan: async () => tables.show("plan", await names()),
};
const show = guarded(async () => { if (shows[current]) await shows[current](); });

async function grow() {
  if (current === "runs" && !document.hidden && !busy) {
    busy = true;
    await guarded(runs.refresh)();
    busy = false;
  }
  setTimeout(grow, EVERY);
}

async function begin() {
  const language = await learn();
  speak(language);
  by("language").value = language;
  by("language").addEventListener("change", () => { speak(by("language").value); show(); });
  const models = (await got("/v1/models")).data;
  know(models);
  options(by("chat-model"), models.filter((one) => one.offers.includes("chat.completions")).map((one) => one.id));
  options(by("classify-model"), models.filter((one) => one.offers.includes("classify")).map((one) => one.id));
  tabs.follow((name) => { current = name; tell(""); show(); });
  for (const id of ["compare-first", "compare-second", "compare-key", "audit-run", "plan-run"]) by(id).addEventListener("change", show);
  by("run-key").addEventListener("change", runs.redraw);
  tabs.open("runs", false);
  grow();
}

guarded(begin)();
