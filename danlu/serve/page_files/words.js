// What the page says, in the language of the browser or the one that was chosen.
let all = { en: {}, zh: {} }, chosen = "en";

export const word = (name) => all[chosen][name] ?? name;

export function speak(language) {
  chosen = language;
  document.documentElement.lang = word("lang");
  document.title = word("title");
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", word(node.dataset.label));
  try { localStorage.setItem("language", language); } catch { /* a browser that keeps nothing */ }
  document.dispatchEvent(new Event("spoken"));
}

export async function learn() {
  all = await (await fetch("/page/file/words.json")).json();
  let kept = null;
  try { kept = localStorage.getItem("language"); } catch { /* as above */ }
  const first = document.documentElement.lang.startsWith("zh") ? "zh" : "en";
  return kept === "zh" || kept === "en" ? kept : first;
}
