// The class of a text, and how much each token of it adds.
import { by, got, guarded, made, tell } from "./ask.js";
import { word } from "./words.js";

let models = [];

export function know(all) { models = all; }

function judged(found) {
  const rows = found.top || [{ label: String(found.score), probability: null }];
  by("classes").replaceChildren(...rows.map((one) => {
    const row = made("tr"), head = made("th", one.label);
    head.scope = "row";
    row.append(head);
    if (one.probability !== null) {
      const meter = made("meter");
      meter.value = one.probability;
      meter.setAttribute("aria-label", one.label);
      row.insertCell().append(meter);
      row.insertCell().textContent = (100 * one.probability).toFixed(1) + " %";
    }
    return row;
  }));
}

function explained(found) {
  const most = Math.max(...found.scores.map(Math.abs), 1e-12);
  by("about").textContent = word("about") + found.target;
  by("marked").replaceChildren(...found.tokens.map((token, place) => {
    const share = found.scores[place], node = made("span", token, share >= 0 ? "for" : "against");
    node.style.borderBottomWidth = Math.round(1 + 7 * Math.abs(share) / most) + "px";
    node.append(made("small", " " + (share > 0 ? "+" : "") + share.toFixed(2)));
    return node;
  }));
}

async function judge(text) {
  const model = models.find((one) => one.id === by("classify-model").value);
  if (!model) { tell(word("nothing")); return; }
  const head = model.heads.find((one) => one.kind === "classify").name;
  by("about").textContent = "";
  by("marked").replaceChildren();
  judged((await got("/v1/classify", { model: model.id, head, input: text, top_k: 20 })).data[0]);
  if (by("explain").checked) explained(await got("/page/explain", { model: model.id, head, text }));
}

by("judge").addEventListener("submit", (event) => {
  event.preventDefault();
  tell("");
  guarded(judge)(by("text").value);
});
