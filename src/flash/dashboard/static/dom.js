// Elements from values. Text always becomes a text node: nothing that a run, a prompt or a log says is ever read as
// markup. Knows no page and no API.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "rect", "circle", "g", "text", "title"]);

/** An element: h("button", {class: "main", onclick: go, disabled: true}, "Go"). Children may nest, null is left out. */
export function h(tag, attributes, ...children) {
  const node = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) set(node, name, value);
  append(node, children);
  return node;
}

function set(node, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
  else if (name === "value" || name === "checked" || name === "selected") node[name] = value;
  else if (name === "dataset") Object.assign(node.dataset, value);
  else node.setAttribute(name, value === true ? "" : String(value));
}

export function append(node, children) {
  for (const child of [children].flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

/** Replaces what is in a node. */
export function fill(node, ...children) {
  node.replaceChildren();
  return append(node, children);
}

/** Draws `value` into `node` with `draw`, unless it is what was drawn there last: focus and selection stay. */
export function keep(node, value, draw) {
  const key = JSON.stringify(value);
  if (node.drawn === key) return;
  node.drawn = key;
  fill(node, draw(value));
}

/** Says something to those who listen rather than look. */
export function announce(text) {
  document.getElementById("said").textContent = text;
}

/** A labelled control. */
export function field(label, control, hint) {
  control.id ||= `f${++counter}`;
  const note = hint ? h("small", { id: `${control.id}-hint`, class: "quiet" }, hint) : null;
  if (note) control.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, note);
}
let counter = 0;

export function select(options, value, onchange, attributes = {}) {
  const node = h("select", { ...attributes, onchange: () => onchange?.(node.value) },
    options.map((option) => {
      const [key, label] = Array.isArray(option) ? option : [option, option];
      return h("option", { value: key, selected: key === value }, label);
    }));
  node.value = value;
  return node;
}

/** A table that scrolls sideways on a narrow screen, with a caption for those who can't see it. "#Step" heads numbers. */
export function table(caption, headings, rows, attributes = {}) {
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", attributes,
      h("caption", { class: "unseen" }, caption),
      h("thead", null, h("tr", null, headings.map((each) => (each.startsWith("#") ? h("th", { scope: "col", class: "number" }, each.slice(1)) : h("th", { scope: "col" }, each))))),
      h("tbody", null, rows)));
}

/** What a page shows where there is nothing: why, and what to do next. */
export function empty(title, ...what) {
  return h("div", { class: "empty" }, h("p", null, h("strong", null, title)), h("p", null, what));
}

export function code(text) {
  return h("code", null, text);
}

/** One name and its value in a list of facts (`dl`). */
export function fact(name, ...value) {
  return [h("dt", null, name), h("dd", null, value)];
}
