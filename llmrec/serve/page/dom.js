// Makes elements. Whatever comes from the server becomes text, never markup.

/** Return the element with an id. */
export const byId = (id) => document.getElementById(id);

/** Make an element: `el("li", { class: "item", onclick: ... }, "text", child, ...)`. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Say something to those who cannot see that the page changed. */
export function announce(words) {
  byId("status").textContent = words;
}

export function show(element, visible) {
  element.hidden = !visible;
}

/** Values of attributes on one line: lists by commas, the rest by a dot. */
export function inWords(attributes) {
  return Object.entries(attributes ?? {})
    .map(([name, value]) => valueInWords(name, value))
    .filter((words) => words !== "")
    .join(" · ");
}

function valueInWords(name, value) {
  if (Array.isArray(value)) return value.join(", ");
  if (typeof value === "boolean") return value ? name : "";
  // A year speaks for itself; other numbers need their name.
  if (typeof value === "number" && name !== "year") return `${name} ${shortNumber(value)}`;
  return String(value);
}

export function shortNumber(value) {
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

/** "12 ms" or "1.3 s". */
export function duration(ms) {
  if (ms < 1) return "under 1 ms";
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

/** Call a function once, some time after the last call of what is returned. */
export function later(work, ms) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), ms);
  };
}
