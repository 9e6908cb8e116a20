// A text field with a list of suggestions, after the ARIA combobox pattern: arrows move, Enter takes,
// Escape closes. The focus never leaves the text field.

import { latest } from "./api.js";
import { announce, el, later } from "./dom.js";

const WAIT_MS = 120;

/**
 * Make a combobox of a field.
 *
 * @param {HTMLElement} box       holds the label and the input
 * @param {object} use
 *   suggest(text, signal)        returns a list of values
 *   label(value)                 its words: [title, what distinguishes it]
 *   take(value)                  called with the value that was taken
 *   free(text)                   called with text that was typed and confirmed; if missing, the first
 *                                suggestion is what Enter takes
 *   onempty()                    Backspace in an empty field
 */
export function combobox(box, use) {
  const input = box.querySelector("input");
  const name = input.labels[0].firstChild.textContent.trim();
  const list = el("ul", { role: "listbox", id: `${input.id}-list`, "aria-label": name, hidden: true });
  input.after(list);
  for (const [attribute, value] of Object.entries({
    role: "combobox",
    "aria-autocomplete": "list",
    "aria-expanded": "false",
    "aria-controls": list.id,
    autocomplete: "off",
    spellcheck: "false",
  })) {
    input.setAttribute(attribute, value);
  }
  let values = [];
  let active = -1;

  function close() {
    list.hidden = true;
    active = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  function activate(index) {
    active = index;
    [...list.children].forEach((option, at) => option.setAttribute("aria-selected", String(at === index)));
    if (index < 0) {
      input.removeAttribute("aria-activedescendant");
      return;
    }
    input.setAttribute("aria-activedescendant", list.children[index].id);
    list.children[index].scrollIntoView({ block: "nearest" });
  }

  function take(index) {
    const value = values[index];
    close();
    fetchSoon.cancelled = true;
    input.value = "";
    use.take(value);
  }

  const ask = latest(async (signal, text) => {
    const found = await use.suggest(text, signal);
    return signal.aborted ? undefined : found;
  });

  async function open(text) {
    const found = await ask(text);
    if (found === undefined || fetchSoon.cancelled || document.activeElement !== input) return;
    values = found;
    list.replaceChildren(
      ...found.map((value, index) => {
        const [title, more] = use.label(value);
        return el(
          "li",
          {
            role: "option",
            id: `${list.id}-${index}`,
            "aria-selected": "false",
            // Before the field loses the focus.
            onmousedown: (event) => {
              event.preventDefault();
              take(index);
            },
          },
          el("span", {}, title),
          more ? el("small", {}, more) : null,
        );
      }),
    );
    list.hidden = found.length === 0;
    input.setAttribute("aria-expanded", String(found.length > 0));
    activate(found.length && !use.free ? 0 : -1);
    announce(found.length === 1 ? "1 suggestion" : `${found.length} suggestions`);
  }

  const wait = later(open, WAIT_MS);
  function fetchSoon(text) {
    fetchSoon.cancelled = false;
    wait(text);
  }

  input.addEventListener("input", () => fetchSoon(input.value));
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    const last = values.length - 1;
    const opened = !list.hidden;
    if (event.isComposing) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!opened) fetchSoon(input.value);
      else if (event.key === "ArrowDown") activate(active >= last ? 0 : active + 1);
      else activate(active <= 0 ? last : active - 1);
    } else if (event.key === "Enter") {
      // Enter belongs to this field; the form is sent by its button.
      event.preventDefault();
      if (opened && active >= 0) take(active);
      else if (use.free) {
        fetchSoon.cancelled = true;
        close();
        use.free(input.value.trim());
      }
    } else if (event.key === "Escape" && opened) {
      event.preventDefault();
      close();
    } else if (event.key === "Backspace" && input.value === "" && !event.repeat) {
      use.onempty?.();
    }
  });
}
