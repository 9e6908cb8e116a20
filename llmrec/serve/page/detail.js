// One item with everything that is known of it, and what is like it.

import { call, inPath, latest } from "./api.js";
import { byId, el, inWords, show } from "./dom.js";

const SIMILAR = 10;

/** Make the dialog; `choose(item)` is called for the button, `failed(error)` for what is refused; `atMost(k)` keeps the server's limit. */
export function makeDetail({ choose, failed, atMost }) {
  const dialog = byId("detail");
  let shown = null;
  byId("detail-close").addEventListener("click", () => dialog.close());
  byId("detail-choose").addEventListener("click", () => {
    dialog.close();
    choose(shown);
  });
  // A click beside the dialog closes it, as Escape does.
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });

  const load = latest((signal, itemId) =>
    Promise.all([
      call(`/v1/items/${inPath(itemId)}`, undefined, { signal }),
      call("/v1/similar", { item_id: itemId, k: atMost(SIMILAR) }, { signal }),
    ]),
  );

  return async function open(item, canChoose) {
    let found;
    try {
      found = await load(item.item_id);
    } catch (error) {
      failed(error);
      return;
    }
    if (found === undefined) return;
    const [whole, similar] = found;
    shown = whole;
    byId("detail-title").textContent = whole.title;
    byId("detail-id").textContent = `Item ${whole.item_id}${whole.active ? "" : ", removed from the catalogue"}`;
    byId("detail-text").textContent = whole.text;
    byId("detail-attributes").replaceChildren(
      ...Object.entries(whole.attributes).flatMap(([name, value]) => [
        el("dt", {}, name),
        el("dd", {}, Array.isArray(value) ? value.join(", ") : String(value)),
      ]),
    );
    byId("similar").replaceChildren(
      ...similar.items.map((one) =>
        el(
          "li",
          { "data-id": one.item_id },
          el("button", { type: "button", class: "title", onclick: () => open(one, canChoose) }, one.title),
          el("small", {}, inWords(one.attributes)),
        ),
      ),
    );
    show(byId("detail-choose"), canChoose && whole.active);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    byId("detail-title").focus();
  };
}
