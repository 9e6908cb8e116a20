// The page: who asks, for what, under which rules; and what comes back.

import { call, hasKey, inPath, latest, Refused, setKey, withQuery } from "./api.js";
import { combobox } from "./combobox.js";
import { makeDetail } from "./detail.js";
import { announce, byId, el, inWords, later, show } from "./dom.js";
import { makeFilters } from "./filters.js";
import { showReasons, showStages } from "./results.js";

const ENOUGH = 5; // choices after which the page stops asking
const FEW = 8; // suggestions, questions at once
const PAST = 20;

let about = null;
let where = () => undefined;
let history = []; // {item_id, title}, oldest first
let user = "";
const hidden = new Map(); // item id -> title
const passed = [];
const storing = new Set(); // ids of choices that are on their way
let asking = true; // whether the questions at the beginning are wanted
let narrowed = false; // whether a list was picked on a narrow screen, which has room for one
let answered = null; // the latest answer, for the switch of the right column

const atMost = (k) => Math.min(k, about?.limits.max_k ?? k);
const mode = () => document.querySelector("input[name=mode]:checked").value;
const which = () => document.querySelector("input[name=which]:checked").value;
const byUser = () => mode() === "user";
const mayStore = () => about?.role === "write";
const canChoose = () => (byUser() ? user !== "" && mayStore() : history.length < (about?.limits.max_history ?? Infinity));

// ---- asking ---------------------------------------------------------------------------------------------

function request() {
  const made = { k: Number(byId("k").value), seen: byId("seen").value };
  if (byUser() && user) made.user = user;
  if (!byUser() && history.length) made.history = history.map((item) => item.item_id);
  const wish = byId("wish").value.trim();
  if (wish) made.query = wish;
  const conditions = where();
  if (conditions) made.where = conditions;
  if (hidden.size) made.exclude = [...hidden.keys()];
  const diversity = Number(byId("diversity").value);
  if (diversity > 0) made.diversity = diversity;
  return made;
}

const fetchStages = latest(async (signal, body) => {
  const plain = await call("/v1/stages", body, { signal });
  // Reasons cost more and come later; the times are those of the answer without them.
  const reasons = call("/v1/stages", { ...body, explain: true }, { signal });
  reasons.catch(() => {}); // looked at below, unless a newer answer came before
  return { plain, reasons };
});

/** Ask again and show the answer; `said` is what was done, for those who see it and those who hear it. */
async function refresh(said = "") {
  if (about === null) {
    await begin(); // which asks again where the server did not answer, or for the key
    return;
  }
  byId("results").setAttribute("aria-busy", "true");
  const body = request();
  let found;
  try {
    found = await fetchStages(body);
  } catch (error) {
    failed(error);
    return;
  }
  if (found === undefined) return;
  void askForSeeds();
  show(byId("error"), false);
  const asked = Boolean(body.user || body.history || body.query);
  answered = { plain: found.plain, explained: null, asked };
  render();
  const { stages } = found.plain;
  byId("said").textContent = said;
  announce(`${said} ${stages[0].items.length} recommendations`);
  byId("results").setAttribute("aria-busy", "false");
  const mine = answered;
  try {
    mine.explained = await found.reasons;
    if (answered === mine) showReasons(mine.explained, which());
  } catch (error) {
    if (error.name !== "AbortError") failed(error);
  }
}

const refreshSoon = later(() => void refresh(), 250);

function render() {
  const actions = { choose, hide, open: openDetail, components: about.components, canChoose: canChoose(), asked: answered.asked };
  showStages(answered.plain, which(), actions);
  if (!narrowed) pickColumn(answered.plain.lm_weight > 0 ? "after" : "before");
  if (answered.explained) showReasons(answered.explained, which());
  show(byId("hidden-note"), hidden.size > 0);
  byId("hidden-note").replaceChildren(
    `Hidden: ${[...hidden.values()].join(", ")}. `,
    el("button", { type: "button", class: "link", onclick: unhide }, "Show again"),
  );
}

/** Show one of the lists where there is room for one: at first the one that is served. */
function pickColumn(name) {
  document.querySelector(`input[name=column][value=${name}]`).checked = true;
  document.querySelector(".columns").dataset.shown = name;
}

function openDetail(item) {
  void detail(item, canChoose());
}

function failed(error) {
  if (error.name === "AbortError") return;
  if (error instanceof Refused && error.status === 401) {
    askForKey();
    return;
  }
  const line = byId("error");
  line.textContent = error instanceof Refused ? error.message : `Something went wrong on this page: ${error.message}`;
  show(line, true);
  byId("results").setAttribute("aria-busy", "false");
  if (!(error instanceof Refused)) console.error(error);
}

// ---- feedback -------------------------------------------------------------------------------------------

/** What was chosen counts at once: in the stored history of a user, or in the one on this page. */
async function choose(item) {
  // A button pressed twice is one choice.
  if (storing.has(item.item_id)) return;
  storing.add(item.item_id);
  try {
    await keepChoice(item);
  } finally {
    storing.delete(item.item_id);
  }
}

async function keepChoice(item) {
  const keep = byUser() ? user : byId("keep").value.trim();
  try {
    if (keep && mayStore()) await call("/v1/events", { user_id: keep, item_id: item.item_id });
  } catch (error) {
    failed(error);
    return;
  }
  hidden.delete(item.item_id);
  const stored = keep && mayStore() ? `${item.title} is stored for user ${keep}.` : `${item.title} is in the history.`;
  if (byUser()) await showPast();
  else addToHistory(item);
  await refresh(stored);
}

function hide(item) {
  hidden.set(item.item_id, item.title);
  void refresh(`${item.title} is hidden.`);
}

function unhide() {
  hidden.clear();
  byId("before-title").focus();
  void refresh();
}

// ---- for whom -------------------------------------------------------------------------------------------

function addToHistory(item) {
  history = [...history.filter((one) => one.item_id !== item.item_id), { item_id: item.item_id, title: item.title }];
  showChips();
}

function removeFromHistory(index) {
  history = history.filter((_, at) => at !== index);
  showChips();
  void refresh();
}

function removeChip(index) {
  removeFromHistory(index);
  const left = byId("chips").querySelectorAll("button");
  (left[Math.min(index, left.length - 1)] ?? byId("item-input")).focus();
}

function showChips() {
  byId("chips").replaceChildren(
    ...history.map(({ item_id, title }, index) =>
      el(
        "li",
        { "data-id": item_id },
        el("span", {}, title),
        el("button", { type: "button", "aria-label": `Remove ${title}`, onclick: () => removeChip(index) }, "✕"),
      ),
    ),
  );
}

async function setUser(id) {
  user = id;
  byId("user-input").value = id;
  await showPast();
  await refresh();
}

const fetchPast = latest((signal, id) => call(withQuery(`/v1/users/${inPath(id)}/history`, { k: atMost(PAST) }), undefined, { signal }));

async function showPast() {
  let events = [];
  try {
    if (user) {
      const found = await fetchPast(user);
      if (found === undefined) return;
      events = found.events;
    }
  } catch (error) {
    failed(error);
    return;
  }
  const none = user ? "No stored events: this is a new user." : "Whose stored history counts.";
  byId("past-head").textContent = events.length ? `Latest ${events.length} of the stored history, newest first` : none;
  byId("past").replaceChildren(...events.reverse().map((event) => el("li", {}, event.title || event.item_id)));
}

// ---- questions at the beginning ---------------------------------------------------------------------------

const fetchSeeds = latest((signal, body) => call("/v1/seeds", body, { signal }));

async function askForSeeds() {
  const wanted = asking && !byUser() && history.length < ENOUGH && !byId("wish").value.trim();
  show(byId("begin"), wanted);
  if (!wanted) return;
  const chosen = history.map((item) => item.item_id);
  // What was passed over may be found by its title after all.
  const body = { k: atMost(FEW), chosen, passed: passed.filter((id) => !chosen.includes(id)) };
  const conditions = where();
  if (conditions) body.where = conditions;
  let found;
  try {
    found = await fetchSeeds(body);
  } catch (error) {
    // The lists say what is wrong with the same conditions.
    if (error instanceof Refused && error.status !== 401) show(byId("begin"), false);
    else failed(error);
    return;
  }
  if (found === undefined) return;
  const inside = byId("seeds").contains(document.activeElement);
  byId("begin-hint").textContent = history.length
    ? `${history.length} of ${ENOUGH} chosen. What comes next is nearer to that.`
    : "Choose one: these are popular, and unlike each other. Each choice narrows what comes next.";
  byId("seeds").replaceChildren(
    ...found.items.map((item) =>
      el(
        "li",
        { "data-id": item.item_id },
        el(
          "button",
          { type: "button", onclick: () => void choose(item) },
          el("b", {}, item.title),
          el("small", {}, inWords(item.attributes)),
        ),
      ),
    ),
  );
  show(byId("begin-pass"), found.items.length > 0);
  if (inside) byId("seeds").querySelector("button")?.focus({ preventScroll: true });
}

function passSeeds() {
  passed.push(...[...byId("seeds").children].map((seed) => seed.dataset.id));
  void askForSeeds();
}

// ---- the key ----------------------------------------------------------------------------------------------

function askForKey() {
  const dialog = byId("key-dialog");
  byId("key-title").textContent = hasKey() ? "The server does not know this key" : "This server needs a key";
  byId("key").value = "";
  if (!dialog.open) dialog.showModal();
}

// ---- the beginning ----------------------------------------------------------------------------------------

const detail = makeDetail({ choose: (item) => void choose(item), failed, atMost });

function restart() {
  history = [];
  user = "";
  asking = true;
  hidden.clear();
  passed.length = 0;
  byId("ask").reset();
  byId("diversity-shown").textContent = "0";
  modeChanged();
  showChips();
  void showPast();
  byId("item-input").focus();
  void refresh();
}

function modeChanged() {
  show(byId("by-history"), !byUser());
  show(byId("by-user"), byUser());
}

function wire() {
  combobox(byId("item-box"), {
    suggest: async (text, signal) =>
      (await suggestions(withQuery("/v1/items", { prefix: text, k: atMost(FEW) }), signal)).items ?? [],
    label: (item) => [item.title, inWords(item.attributes)],
    take: (item) => {
      addToHistory(item);
      void refresh();
    },
    onempty: () => history.length && removeFromHistory(history.length - 1),
  });
  combobox(byId("user-box"), {
    suggest: async (text, signal) => {
      // Without the right to list users, ids are typed in full.
      if (!mayStore()) return [];
      return (await suggestions(withQuery("/v1/users", { prefix: text, k: atMost(FEW) }), signal)).users ?? [];
    },
    label: (id) => [id, ""],
    take: (id) => void setUser(id),
    free: (id) => void setUser(id),
  });
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => {
      modeChanged();
      void showPast();
      void refresh();
    });
  }
  for (const radio of document.querySelectorAll("input[name=which]")) radio.addEventListener("change", render);
  for (const radio of document.querySelectorAll("input[name=column]")) {
    radio.addEventListener("change", () => {
      narrowed = true;
      pickColumn(radio.value);
    });
  }
  byId("user-input").addEventListener("change", () => {
    const typed = byId("user-input").value.trim();
    if (typed !== user) void setUser(typed);
  });
  byId("wish").addEventListener("input", refreshSoon);
  byId("diversity").addEventListener("input", () => {
    byId("diversity-shown").textContent = byId("diversity").value;
    refreshSoon();
  });
  for (const id of ["k", "seen"]) byId(id).addEventListener("change", () => void refresh());
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const typed = byId("user-input").value.trim();
    if (byUser() && typed !== user) void setUser(typed);
    else void refresh();
    byId("after-title").focus();
  });
  byId("restart").addEventListener("click", restart);
  byId("begin-close").addEventListener("click", () => {
    asking = false;
    show(byId("begin"), false);
    byId("before-title").focus();
  });
  byId("begin-pass").addEventListener("click", passSeeds);
  byId("key-open").addEventListener("click", askForKey);
  byId("key-form").addEventListener("submit", () => {
    setKey(byId("key").value.trim());
    void begin();
  });
}

async function suggestions(path, signal) {
  try {
    return await call(path, undefined, { signal });
  } catch (error) {
    failed(error);
    return {};
  }
}

/** Ask what is served and fill what depends on it; again with each key. */
async function begin() {
  let attributes;
  try {
    [about, { attributes }] = await Promise.all([call("/v1/about"), call("/v1/attributes")]);
  } catch (error) {
    failed(error);
    return;
  }
  show(byId("key-open"), hasKey());
  const models = { none: "no language model", "left out": "a language model, left out", "takes part": "with a language model" };
  byId("facts").textContent = `${about.items.toLocaleString("en")} items · ${models[about.language_model]}`;
  const sizes = [...new Set([5, 10, 20, 50].map(atMost))];
  byId("k").replaceChildren(...sizes.map((size) => el("option", { value: size, selected: size === atMost(10) }, String(size))));
  show(byId("keep-field"), mayStore());
  where = makeFilters(attributes, refreshSoon);
  await refresh();
}

wire();
modeChanged();
await begin();
