// The two columns: what retrieval answers, what comes out with the language model, and what moved.

import { byId, duration, el, inWords, show } from "./dom.js";

const COLOURS = 8;
const colours = new Map();

/**
 * Show an answer of /v1/stages.
 *
 * @param {object} answer
 * @param {string} wanted          stage of the right column where the model takes part
 * @param {object} given           choose(item), hide(item), open(item), components, canChoose, asked
 */
export function showStages(answer, wanted, given) {
  const stages = Object.fromEntries(answer.stages.map((stage) => [stage.name, stage]));
  const weight = answer.lm_weight ?? null;
  const left = stages.retrieval;
  const actions = { ...given, served: weight > 0 && wanted === "default" };
  const right = weight > 0 ? stages[wanted] : stages["language model"];
  const focused = focusedItem();
  const ranks = (stage) => new Map(stage.items.map((item) => [item.item_id, item.rank]));
  fill("before", left, right && ranks(right), actions);
  show(byId("which"), weight > 0);
  byId("before-title").textContent = "Before the language model";
  byId("after-title").textContent = "After the language model";
  byId("after-short").textContent = "After";
  if (right) fill("after", right, ranks(left), actions);
  else byId("after").querySelector(".items").replaceChildren();
  describe(weight, left, right, wanted, actions.asked);
  showLegend([left, right], actions.components);
  restoreFocus(focused);
}

function describe(weight, left, right, wanted, asked) {
  // Where nothing is asked every list rests on popularity.
  const alone = asked ? "What it would answer without retrieval" : "What it would answer with popularity alone";
  const served = weight > 0 ? "" : ", which is what is served";
  about("before", `Retrieval alone${served}`, left);
  const note = byId("note");
  if (weight === null) {
    about("after", "There is no language model here. After llmrec finetune, this column shows what it changes.");
    note.textContent = "No language model has been tuned for this catalogue: what is served is retrieval alone.";
  } else if (weight === 0) {
    byId("after-title").textContent = "The language model alone";
    byId("after-short").textContent = "The model alone";
    about("after", alone, right);
    note.textContent =
      "The language model’s weight is 0 for this request: on held-out events its gain was within noise, so it " +
      "is left out of what is served. The first list is what retrieval answers, the second what the language " +
      "model alone would answer.";
  } else {
    about("after", wanted === "default" ? "Both together, which is what is served" : alone, right);
    note.textContent = `The language model takes part in this answer with the weight ${weight.toFixed(2)}.`;
  }
  show(note, true);
}

function about(column, words, stage) {
  const line = byId(column).querySelector(".about");
  line.replaceChildren(words);
  if (stage) line.append(" · ", el("span", { class: "took" }, duration(stage.ms)));
}

function fill(column, stage, others, actions) {
  const most = Math.max(...stage.items.map((item) => item.score), 1e-9);
  const items = stage.items.map((item) => itemOf(column, item, most, others, actions));
  const list = byId(column).querySelector(".items");
  list.replaceChildren(...items);
  if (!items.length) list.append(el("li", { class: "empty" }, "Nothing meets these conditions."));
}

function itemOf(column, item, most, others, actions) {
  const act = (name, words, work) =>
    el("button", { type: "button", "data-act": name, "aria-label": `${words} ${item.title}`, onclick: () => work(item) }, words);
  const title = el("button", { type: "button", class: "title", "data-act": "open", onclick: () => actions.open(item) }, item.title);
  const sources = item.sources ?? [];
  const bar = el("div", { class: "bar", "aria-hidden": "true" });
  for (const source of sources) {
    const part = el("i", { class: `c${colourOf(source.name)}` });
    part.style.width = `${Math.max(0, (100 * source.score) / most)}%`;
    bar.append(part);
  }
  return el(
    "li",
    { class: "item", "data-id": item.item_id },
    el(
      "div",
      { class: "place" },
      el("span", { class: "rank", "aria-hidden": "true" }, String(item.rank)),
      others ? movement(column, item, others, actions.served) : null,
    ),
    el(
      "div",
      { class: "body" },
      title,
      el("p", { class: "attributes" }, inWords(item.attributes)),
      el("p", { class: "reason" }),
      bar,
      el(
        "details",
        {},
        el("summary", {}, "Evidence", el("span", { class: "score" }, item.score.toFixed(3))),
        el("ul", { class: "evidence" }, ...sources.map((source) => evidence(source, actions.components))),
      ),
    ),
    el(
      "div",
      { class: "acts" },
      actions.canChoose ? act("choose", "Choose", actions.choose) : null,
      act("hide", "Hide", actions.hide),
    ),
  );
}

function evidence(source, components) {
  const meaning = components[source.name] ?? source.name;
  const place = source.rank > 0 ? `place ${source.rank} of its own list, ` : "";
  return el(
    "li",
    {},
    el("i", { class: `swatch c${colourOf(source.name)}`, "aria-hidden": "true" }),
    el("b", {}, source.name),
    `: ${meaning}; ${place}adds ${source.score.toFixed(3)}`,
  );
}

/** How an item of one column stands to the other one. */
function movement(column, item, others, served) {
  const there = others.get(item.item_id);
  const badge = (kind, sign, words) =>
    el("span", { class: `move ${kind}` }, el("span", { "aria-hidden": "true" }, sign), el("span", { class: "spoken" }, words));
  if (column === "before") return there === undefined ? badge("gone", served ? "leaves" : "only here", "not in the other list") : null;
  if (there === undefined) return badge("new", "new", "new in this list");
  const up = there - item.rank;
  if (up > 0) return badge("up", `▲ ${up}`, `up ${up}`);
  if (up < 0) return badge("down", `▼ ${-up}`, `down ${-up}`);
  return badge("same", "=", "same place");
}

/** Put reasons, which come later, to the items that are shown. */
export function showReasons(answer, wanted) {
  const weight = answer.lm_weight ?? null;
  const rightName = weight > 0 ? wanted : "language model";
  for (const [column, name] of [["before", "retrieval"], ["after", rightName]]) {
    const stage = answer.stages.find((one) => one.name === name);
    const reasons = new Map((stage?.items ?? []).map((item) => [item.item_id, item.reason]));
    for (const shown of byId(column).querySelectorAll(".item")) {
      const reason = reasons.get(shown.dataset.id);
      if (!reason) continue;
      shown.querySelector(".reason").textContent = reason.sentence;
      const list = shown.querySelector(".evidence");
      list.querySelectorAll(".influence").forEach((old) => old.remove());
      for (const one of reason.history ?? []) {
        const words = `without ${one.title} in the history its score would be ${one.amount.toFixed(3)} lower`;
        list.append(el("li", { class: "influence" }, words));
      }
    }
  }
}

function colourOf(name) {
  if (!colours.has(name)) colours.set(name, colours.size % COLOURS);
  return colours.get(name);
}

function showLegend(stages, components) {
  const names = new Set();
  for (const stage of stages) {
    for (const item of stage?.items ?? []) (item.sources ?? []).forEach((source) => names.add(source.name));
  }
  const entries = [...names].map((name) =>
    el("li", {}, el("i", { class: `swatch c${colourOf(name)}`, "aria-hidden": "true" }), el("b", {}, name), ` ${components[name] ?? ""}`),
  );
  byId("legend").replaceChildren(...entries);
}

/** Which button of which place has the focus, since the lists are made anew. */
function focusedItem() {
  const item = document.activeElement?.closest?.(".columns .item");
  if (!item) return null;
  return {
    column: item.closest("section").id,
    place: [...item.parentElement.children].indexOf(item),
    act: document.activeElement.dataset.act ?? "open",
  };
}

function restoreFocus(focused) {
  if (!focused) return;
  const items = byId(focused.column).querySelectorAll(".item");
  const item = items[Math.min(focused.place, items.length - 1)];
  const target = item?.querySelector(`[data-act="${focused.act}"]`) ?? item?.querySelector("[data-act]");
  (target ?? byId(`${focused.column}-title`)).focus({ preventScroll: true });
}
