// Tabs as the ARIA practices have them: arrows, Home and End move, only the chosen one is in the tab order.
const tabs = [...document.querySelectorAll("[role=tab]")];
let opened = () => {};

export function open(name, focus) {
  for (const tab of tabs) {
    const mine = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(mine));
    tab.tabIndex = mine ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !mine;
    if (mine && focus) tab.focus();
  }
  opened(name);
}

export function follow(then) {
  opened = then;
  for (const [place, tab] of tabs.entries()) {
    tab.addEventListener("click", () => open(tab.getAttribute("aria-controls"), true));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      open(tabs[(to + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
    });
  }
}
