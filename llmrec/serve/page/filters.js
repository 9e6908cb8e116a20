// Conditions on attributes, made from what the catalogue has.

import { byId, el, shortNumber } from "./dom.js";

/** Fill the filters for the attributes of the catalogue; `changed` is called when one changes. */
export function makeFilters(attributes, changed) {
  const made = Object.entries(attributes)
    .filter(([, about]) => about.different > 0)
    .map(([name, about]) => filterOf(name, about));
  byId("filters").replaceChildren(...made.map((filter) => filter.element));
  byId("filters").oninput = () => changed();
  byId("filters-clear").onclick = () => {
    for (const field of byId("filters").querySelectorAll("input, select")) {
      if (field.type === "checkbox") field.checked = false;
      else field.value = "";
    }
    changed();
  };
  /** The conditions as `where` takes them; undefined if there are none. */
  return function where() {
    const met = made.map((filter) => [filter.name, filter.condition()]).filter(([, condition]) => condition !== null);
    byId("filters-count").textContent = met.length ? String(met.length) : "";
    return met.length ? Object.fromEntries(met) : undefined;
  };
}

function filterOf(name, about) {
  if (about.kind === "number") return numbers(name, about);
  if (about.kind === "boolean") return yesOrNo(name);
  return words(name, about);
}

function numbers(name, about) {
  const field = (label, bound) =>
    el("input", { type: "number", step: "any", "aria-label": `${name} ${label}`, placeholder: shortNumber(bound) });
  const [from, to] = [field("from", about.min), field("to", about.max)];
  const element = el("fieldset", { class: "range" }, el("legend", {}, name), from, el("span", {}, "to"), to);
  return {
    name,
    element,
    condition() {
      const bounds = {};
      if (from.value !== "") bounds.gte = Number(from.value);
      if (to.value !== "") bounds.lte = Number(to.value);
      return Object.keys(bounds).length ? bounds : null;
    },
  };
}

function yesOrNo(name) {
  const select = el("select", {}, el("option", { value: "" }, "any"));
  select.append(el("option", { value: "true" }, "yes"), el("option", { value: "false" }, "no"));
  const element = el("div", { class: "field" }, el("label", {}, `${name} `, select));
  return { name, element, condition: () => (select.value === "" ? null : select.value === "true") };
}

function words(name, about) {
  // Where hardly any value comes twice there is nothing to tick.
  const listed = about.frequent.length && about.frequent[0].items > 1 ? about.frequent : [];
  const boxes = listed.map(({ value }) => el("input", { type: "checkbox", value }));
  const choices = listed.map(({ value, items }, index) =>
    el("label", {}, boxes[index], el("span", {}, value), el("small", {}, items.toLocaleString("en"))),
  );
  const complete = listed.length === about.different;
  const word = complete ? null : el("input", { type: "text", "aria-label": `${name} has the word`, placeholder: "has the word" });
  const element = el("fieldset", {}, el("legend", {}, name));
  if (choices.length) element.append(el("div", { class: "choices" }, ...choices));
  if (word) element.append(word);
  return {
    name,
    element,
    condition() {
      const condition = {};
      const ticked = boxes.filter((box) => box.checked).map((box) => box.value);
      if (ticked.length) condition.in = ticked;
      if (word?.value.trim()) condition.match = word.value.trim();
      return Object.keys(condition).length ? condition : null;
    },
  };
}
