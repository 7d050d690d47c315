// A run's log: its end, followed while the run lives; earlier lines on demand; search on the server.

import { get } from "../api.js";
import { empty, field, fill, h } from "../dom.js";
import { note } from "../router.js";
import { ansi, clock } from "../text.js";

const PAGE = 500;
const KEPT = 4000; // lines in the page: beyond that the oldest leave
const PAUSE = 250; // ms without a key before a search is asked for

export async function open({ id, body, signal, query }) {
  const path = `/api/runs/${encodeURIComponent(id)}/log`;
  let find = query.get("find") ?? "";
  let follow = true;
  let last = 0;
  let lastEver = 0;
  let typing = null;
  const box = h("div", { class: "log", tabindex: "0", role: "log", "aria-label": "Log", "aria-live": "off" });
  const search = h("input", { type: "search", value: find, oninput: () => { clearTimeout(typing); typing = setTimeout(() => look(search.value), PAUSE); } });
  const toggle = h("input", { type: "checkbox", checked: true, onchange: () => { follow = toggle.checked; if (follow) toEnd(); } });
  const earlier = h("button", { hidden: true, onclick: back }, "Earlier lines");
  const status = h("span", { class: "quiet", role: "status" });
  fill(body, h("div", { class: "bar" }, h("div", { class: "grow" }, field("Search the whole log", search)), h("label", null, toggle, " Follow"), earlier, status), box);
  box.addEventListener("scroll", () => {
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
    if (follow !== atEnd) { follow = atEnd; toggle.checked = atEnd; }
  });

  function toEnd() { box.scrollTop = box.scrollHeight; }

  async function look(text) {
    find = text;
    note({ find });
    const page = await get(path, { find, limit: PAGE }, signal);
    if (text !== find) return;
    last = page.lines.at(-1)?.seq ?? 0;
    lastEver = Math.max(lastEver, last);
    earlier.hidden = !page.more;
    fill(box, page.lines.length ? page.lines.map((line) => row(line, find)) : empty(find ? "No line says that." : "Nothing was written yet."));
    status.textContent = find ? `${page.lines.length}${page.more ? " or more" : ""} lines` : "";
    if (follow) toEnd();
  }

  async function back() {
    earlier.disabled = true;
    const first = box.querySelector("[data-seq]");
    const page = await get(path, { find, before: first.dataset.seq, limit: PAGE }, signal);
    const height = box.scrollHeight;
    box.prepend(...page.lines.map((line) => row(line, find)));
    box.scrollTop += box.scrollHeight - height;
    earlier.hidden = !page.more;
    earlier.disabled = false;
  }

  await look(find);
  return {
    async update() {
      const page = await get(path, { after: lastEver, find, limit: 2000 }, signal);
      if (!page.lines.length) return;
      lastEver = page.lines.at(-1).seq;
      box.querySelector(".empty")?.remove();
      box.append(...page.lines.map((line) => row(line, find)));
      while (follow && box.children.length > KEPT) { box.firstChild.remove(); earlier.hidden = false; }
      if (follow) toEnd();
    },
  };
}

function row(line, find) {
  const { kind, data } = line;
  const from = kind === "log" ? data.stream : kind;
  const node = h("div", { class: `line kind-${kind}`, dataset: { seq: line.seq } }, clock(line.time), h("span", { class: "from" }, from ?? ""), h("span", null, ansi(words(kind, data))));
  if (find) highlight(node.lastChild, find.toLowerCase());
  return node;
}

function words(kind, data) {
  if (kind === "log" || kind === "warning") return data.text ?? "";
  if (kind === "state") return `${data.from ?? ""} → ${data.to}${data.reason ? `: ${data.reason}` : ""}`;
  if (kind === "attempt") return `attempt ${data.epoch} ${data.state}${data.failure ? ` (${data.failure})` : ""}${data.message ? `: ${data.message}` : ""}`;
  if (kind === "phase") return `${data.phase}${data.total_bytes ? `, ${data.done_bytes} of ${data.total_bytes} bytes` : ""}`;
  return JSON.stringify(data);
}

function highlight(node, find) {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (const text of texts) {
    let at = text.data.toLowerCase().indexOf(find);
    let rest = text;
    while (at >= 0 && find) {
      const hit = rest.splitText(at);
      rest = hit.splitText(find.length);
      const marked = h("mark");
      hit.replaceWith(marked);
      marked.append(hit);
      at = rest.data.toLowerCase().indexOf(find);
    }
  }
}
