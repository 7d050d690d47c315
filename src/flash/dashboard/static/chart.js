// Lines over steps: drawn as SVG from points that the server has thinned already. Owns scales, smoothing, the band
// between extremes, the cursor, and zooming by pointer or keyboard. Knows no run and no metric's meaning.

import { announce, fill, h, keep } from "./dom.js";
import { number } from "./text.js";

const HEIGHT = 176;
const LEFT = 52;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 22;

/** Exponential smoothing that starts unbiased; `weight` 0 leaves values as they are. Gaps stay gaps. */
export function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0;
  let norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

/**
 * A chart. `update({lines, x, weight, log, from, to, legend})` draws: `x` are the steps, each line {label, colour, values, low,
 * high, x?}. `onzoom(from, to)` is called when the reader picks a part, `onzoom(null)` for all.
 */
export class Chart {
  constructor(title, { onzoom = null, unit = "" } = {}) {
    this.title = title;
    this.unit = unit;
    this.onzoom = onzoom;
    this.output = h("output");
    this.svg = h("svg", { role: "img", tabindex: "0", "aria-label": title });
    this.axes = h("g");
    this.curves = h("g");
    this.over = h("g");
    this.svg.append(this.axes, this.curves, this.over);
    this.width = 400;
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width < 50 || width === this.width) return;
      this.width = width;
      if (this.data) this.update(this.data);
    }).observe(this.svg);
    this.legend = h("ul", { class: "legend", hidden: true });
    this.node = h("section", { class: "card chart", "aria-label": title }, h("h3", null, h("span", null, title), this.output), this.svg, this.legend);
    this.svg.addEventListener("pointermove", (event) => this.#move(event));
    this.svg.addEventListener("pointerleave", () => { if (!this.drag) this.#point(null); });
    this.svg.addEventListener("pointerdown", (event) => { if (event.button === 0 && this.onzoom) this.drag = { from: this.#stepAt(event), pointer: event.pointerId }; });
    this.svg.addEventListener("pointerup", (event) => this.#drop(event));
    this.svg.addEventListener("dblclick", () => this.onzoom?.(null));
    this.svg.addEventListener("keydown", (event) => this.#key(event));
    this.svg.addEventListener("blur", () => this.#point(null));
  }

  update(data) {
    this.data = data;
    const lines = data.lines.map((line) => ({ ...line, x: line.x ?? data.x, shown: smoothed(line.values, data.weight ?? 0) }));
    this.lines = lines;
    const steps = lines.flatMap((line) => (line.x.length ? [line.x[0], line.x.at(-1)] : []));
    this.from = data.from ?? Math.min(...steps);
    this.to = data.to ?? Math.max(...steps);
    if (!(this.to > this.from)) { this.from -= 0.5; this.to += 0.5; }
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.#scale(lines);
    fill(this.curves, lines.map((line) => this.#curve(line, data.weight)));
    this.#axes();
    const last = lines.map((line) => line.shown.findLast((value) => value !== null));
    this.output.textContent = lines.length === 1 && last[0] !== undefined ? number(last[0]) + this.unit : "";
    this.svg.setAttribute("aria-label", this.#words());
    this.legend.hidden = !data.legend || lines.length < 2;
    if (!this.legend.hidden) keep(this.legend, lines.map((line) => [line.label, line.colour]), (names) => names.map(([label, colour]) => h("li", null, h("span", { class: `t${colour}` }, h("span", { class: "swatch" })), label)));
  }

  #scale(lines) {
    let low = Infinity;
    let high = -Infinity;
    for (const line of lines) {
      for (const values of [line.values, line.low, line.high]) {
        for (const [at, value] of (values ?? []).entries()) {
          if (value === null || line.x[at] < this.from || line.x[at] > this.to || (this.data.log && value <= 0)) continue;
          low = Math.min(low, value);
          high = Math.max(high, value);
        }
      }
    }
    if (low > high || (low === 0 && high === 0)) [low, high] = [0, 1];
    if (low === high) { const pad = Math.abs(low) * 0.1 || 0.5; low -= pad; high += pad; }
    if (this.data.log && low > 0) { this.low = Math.log10(low); this.high = Math.log10(high); }
    else { const pad = (high - low) * 0.05; this.low = low - pad; this.high = high + pad; }
  }

  #x(step) { return LEFT + ((step - this.from) / (this.to - this.from)) * (this.width - LEFT - RIGHT); }

  #y(value) {
    const scaled = this.data.log ? Math.log10(value) : value;
    return TOP + (1 - (scaled - this.low) / (this.high - this.low)) * (HEIGHT - TOP - BOTTOM);
  }

  #path(x, values) {
    let path = "";
    let open = false;
    for (const [at, value] of values.entries()) {
      if (value === null || x[at] < this.from || x[at] > this.to || (this.data.log && value <= 0)) { if (value !== null) open = false; continue; }
      path += `${open ? "L" : "M"}${this.#x(x[at]).toFixed(1)} ${this.#y(value).toFixed(1)}`;
      open = true;
    }
    return path;
  }

  #curve(line, weight) {
    const parts = [];
    if (line.low && line.high && !this.data.log) {
      const inside = line.x.map((step, at) => at).filter((at) => line.low[at] !== null && line.x[at] >= this.from && line.x[at] <= this.to);
      if (inside.length > 1) {
        const there = inside.map((at) => `${this.#x(line.x[at]).toFixed(1)} ${this.#y(line.high[at]).toFixed(1)}`);
        const back = inside.reverse().map((at) => `${this.#x(line.x[at]).toFixed(1)} ${this.#y(line.low[at]).toFixed(1)}`);
        parts.push(h("path", { class: `band b${line.colour}`, d: `M${[...there, ...back].join("L")}Z` }));
      }
    }
    if (weight) parts.push(h("path", { class: `curve faint k${line.colour}`, d: this.#path(line.x, line.values) }));
    parts.push(h("path", { class: `curve k${line.colour}`, d: this.#path(line.x, line.shown) }));
    const only = line.shown.filter((value) => value !== null);
    if (only.length === 1) {
      const at = line.shown.findIndex((value) => value !== null);
      parts.push(h("circle", { class: `b${line.colour}`, cx: this.#x(line.x[at]), cy: this.#y(only[0]), r: 3 }));
    }
    return parts;
  }

  #axes() {
    const marks = [];
    for (let part = 0; part <= 3; part++) {
      const scaled = this.low + ((this.high - this.low) * part) / 3;
      const y = TOP + (1 - part / 3) * (HEIGHT - TOP - BOTTOM);
      marks.push(h("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }),
        h("text", { x: LEFT - 5, y: y + 4, "text-anchor": "end" }, number(Number((this.data.log ? 10 ** scaled : scaled).toPrecision(3)))));
    }
    for (let part = 0; part <= 4; part++) {
      const step = Math.round(this.from + ((this.to - this.from) * part) / 4);
      if (part && step === Math.round(this.from + ((this.to - this.from) * (part - 1)) / 4)) continue;
      const anchor = part === 0 ? "start" : part === 4 ? "end" : "middle";
      marks.push(h("text", { x: this.#x(step), y: HEIGHT - 6, "text-anchor": anchor }, this.data.xname ? this.data.xname(step) : step.toLocaleString("en")));
    }
    fill(this.axes, marks);
  }

  #words() {
    const lines = this.lines.filter((line) => line.values.some((value) => value !== null));
    if (!lines.length) return `${this.title}: nothing reported`;
    const said = lines.slice(0, 6).map((line) => {
      const values = line.values.filter((value) => value !== null);
      const low = values.reduce((a, b) => Math.min(a, b));
      const high = values.reduce((a, b) => Math.max(a, b));
      return `${lines.length > 1 ? `${line.label}: ` : ""}from ${number(values[0])} to ${number(values.at(-1))}, between ${number(low)} and ${number(high)}`;
    });
    return `${this.title}, steps ${number(Math.ceil(this.from))} to ${number(Math.floor(this.to))}: ${said.join("; ")}. Arrow keys read values${this.onzoom ? ", plus and minus zoom" : ""}.`;
  }

  // --- the reader's hand ---------------------------------------------------------------------------------------

  #stepAt(event) {
    const box = this.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    return this.from + ((x - LEFT) / (this.width - LEFT - RIGHT)) * (this.to - this.from);
  }

  #move(event) {
    const step = this.#stepAt(event);
    if (this.drag) {
      const a = this.#x(Math.max(this.from, Math.min(this.drag.from, step)));
      const b = this.#x(Math.min(this.to, Math.max(this.drag.from, step)));
      fill(this.over, h("rect", { class: "zone", x: a, y: TOP, width: Math.max(0, b - a), height: HEIGHT - TOP - BOTTOM }));
    } else this.#point(step);
  }

  #drop(event) {
    if (!this.drag) return;
    const [from, to] = [this.drag.from, this.#stepAt(event)].sort((a, b) => a - b);
    this.drag = null;
    fill(this.over);
    if (this.#x(to) - this.#x(from) > 8) this.#zoom(from, to);
  }

  #zoom(from, to) {
    const whole = [Math.max(0, Math.floor(from)), Math.ceil(to)];
    if (whole[1] - whole[0] >= 2) this.onzoom?.(...whole);
  }

  #point(step) {
    this.at = step;
    if (step === null || step === undefined || !this.lines?.length) {
      fill(this.over);
      if (this.lines?.length === 1) {
        const last = this.lines[0].shown.findLast((value) => value !== null);
        this.output.textContent = last === undefined ? "" : number(last) + this.unit;
      } else this.output.textContent = "";
      return "";
    }
    const found = this.lines.map((line) => nearest(line, step)).filter(Boolean);
    if (!found.length) return "";
    const x = this.#x(found[0].step);
    fill(this.over, h("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
      found.map((each) => h("circle", { class: `b${each.line.colour}`, cx: this.#x(each.step), cy: this.#y(each.value), r: 3 })));
    const name = this.data.xname ? this.data.xname(found[0].step) : `step ${found[0].step.toLocaleString("en")}`;
    const text = `${name}: ${found.map((each) => (found.length > 1 ? `${each.line.label} ` : "") + number(each.value) + this.unit).join(", ")}`;
    this.output.textContent = text;
    return text;
  }

  #key(event) {
    if (!this.lines?.length) return;
    const x = this.lines[0].x;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const shown = x.filter((step) => step >= this.from && step <= this.to);
      const now = this.at === null || this.at === undefined ? shown.length - 1 : shown.findIndex((step) => step >= this.at);
      const next = Math.max(0, Math.min(shown.length - 1, now + (event.key === "ArrowLeft" ? -1 : 1)));
      announce(this.#point(shown[next]));
    } else if ((event.key === "+" || event.key === "=") && this.onzoom) {
      const middle = this.at ?? (this.from + this.to) / 2;
      const half = (this.to - this.from) / 4;
      this.#zoom(middle - half, middle + half);
    } else if (event.key === "-" && this.onzoom) {
      const size = this.to - this.from;
      this.#zoom(this.from - size / 2, this.to + size / 2);
    } else if (event.key === "Escape") this.onzoom?.(null);
    else return;
    event.preventDefault();
  }
}

function nearest(line, step) {
  let best = null;
  for (const [at, value] of line.shown.entries()) {
    if (value === null) continue;
    const distance = Math.abs(line.x[at] - step);
    if (!best || distance < best.distance) best = { line, step: line.x[at], value, distance };
  }
  return best;
}

/** A course at a glance, for a table's cell. */
export function spark(values, label) {
  if (values.length < 2) return null;
  const low = Math.min(...values);
  const high = Math.max(...values);
  const points = values.map((value, at) => {
    const y = high === low ? 11 : 20 - ((value - low) / (high - low)) * 18;
    return `${((at / (values.length - 1)) * 88 + 1).toFixed(1)} ${y.toFixed(1)}`;
  });
  return h("svg", { class: "spark", viewBox: "0 0 90 22", role: "img", "aria-label": label }, h("path", { d: `M${points.join("L")}` }));
}
