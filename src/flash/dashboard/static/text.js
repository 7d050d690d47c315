// How values read: numbers, times in the reader's own zone, and text from runs, which may hold anything.
// Control characters, invisible direction marks and terminal colours are shown for what they are.

import { h } from "./dom.js";

const SHORT = 5000; // characters shown before one has to ask for more

// --- text ---------------------------------------------------------------------------------------------------

// C0 and C1 controls but tab and newline; marks that reorder or hide text; lone surrogates; tags.
const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]|\udb40[\udc00-\udfff]/g;
const ESCAPE = /\u001b\[([0-9;:]*)m|\u001b\[[0-?]*[ -/]*[@-~]|\u001b[\]PX^_][^\u0007\u001b]*(?:\u0007|\u001b\\|$)|\u001b[ -/]*[0-~]/g;

/** Nodes for text as it is, odd characters named. */
export function shown(text) {
  return marked(String(text ?? ""));
}

/** A sentence of ours, in which `commands` are set as such. */
export function prose(text) {
  return String(text ?? "").split("`").map((part, at) => (at % 2 ? h("code", null, marked(part)) : marked(part)));
}

function marked(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(ODD)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(h("span", { class: "odd", title: name(match[0]) }, picture(match[0])));
    end = match.index + match[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function picture(character) {
  const code = character.codePointAt(0);
  if (code === 0x7f) return "\u2421";
  return code < 0x20 ? String.fromCodePoint(0x2400 + code) : name(character);
}

function name(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/** Nodes for a terminal's text: colours as classes, all other sequences left out. */
export function ansi(text) {
  const source = String(text ?? "");
  if (!source.includes("\u001b")) return marked(source);
  const nodes = [];
  let state = {};
  let end = 0;
  const emit = (part) => {
    if (!part) return;
    const classes = Object.values(state).filter(Boolean);
    nodes.push(classes.length ? h("span", { class: classes.join(" ") }, marked(part)) : marked(part));
  };
  for (const match of source.matchAll(ESCAPE)) {
    emit(source.slice(end, match.index));
    if (match[1] !== undefined) state = painted(state, match[1]);
    end = match.index + match[0].length;
  }
  emit(source.slice(end));
  return nodes;
}

function painted(state, codes) {
  let next = { ...state };
  const list = codes.split(/[;:]/).map((each) => Number(each || 0));
  for (let at = 0; at < list.length; at++) {
    const code = list[at];
    if (code === 0) next = {};
    else if (code === 1) next.weight = "ansi-bold";
    else if (code === 2) next.weight = "ansi-dim";
    else if (code === 22) next.weight = null;
    else if (code >= 30 && code <= 37) next.colour = `ansi-${code - 30}`;
    else if (code >= 90 && code <= 97) next.colour = `ansi-${code - 90}`;
    else if (code === 39) next.colour = null;
    else if (code === 38 || code === 48) at += list[at + 1] === 5 ? 2 : 4; // palettes: left out
  }
  return next;
}

/** A block of text of any length: cut, with a button for the rest. */
export function long(text, nodes = shown) {
  const source = String(text ?? "");
  const block = h("div", { class: "text" });
  if (source.length <= SHORT) {
    block.append(...flat(nodes(source)));
    return block;
  }
  block.append(...flat(nodes(source.slice(0, SHORT))));
  const more = h("button", { class: "plain", onclick: () => { more.remove(); block.append(...flat(nodes(source.slice(SHORT)))); } },
    `… show the other ${count(source.length - SHORT)} characters`);
  block.append(more);
  return block;
}

function flat(nodes) {
  return [nodes].flat(Infinity).map((each) => (each instanceof Node ? each : document.createTextNode(each)));
}

/** Whatever a value is, as text: objects as JSON. */
export function plain(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "string") return value;
  return typeof value === "object" ? JSON.stringify(value, null, 2) : String(value);
}

// --- numbers --------------------------------------------------------------------------------------------------

export function count(value) {
  return value === null || value === undefined ? "–" : Number(value).toLocaleString("en");
}

/** Four significant digits, whatever the size. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0 || Number.isInteger(value)) return Math.abs(value) < 1e6 ? count(value) : value.toExponential(2);
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${number(value * 100)} %`;
}

export function usd(value) {
  if (value === null || value === undefined) return "–";
  return value === 0 ? "$0" : value < 0.01 ? "< $0.01" : `$${value.toFixed(2)}`;
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (value >= 1000 && at < units.length - 1) { value /= 1000; at++; }
  return `${at ? value.toFixed(1) : value} ${units[at]}`;
}

/** Seconds in words: 42 s, 3 min 5 s, 2 h 10 min. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 10) return `${Number(seconds.toFixed(1))} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h${Math.floor((whole % 3600) / 60) ? ` ${Math.floor((whole % 3600) / 60)} min` : ""}`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

// --- times ----------------------------------------------------------------------------------------------------

const FULL = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "long" });
const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/** A moment, in the reader's zone; the exact one on hover. */
export function moment(seconds) {
  if (!seconds) return "–";
  const date = new Date(seconds * 1000);
  return h("time", { datetime: date.toISOString(), title: FULL.format(date) }, FULL.format(date));
}

export function clock(seconds) {
  const date = new Date(seconds * 1000);
  return h("time", { datetime: date.toISOString(), title: FULL.format(date) }, CLOCK.format(date));
}

export function ago(seconds, now = Date.now() / 1000) {
  const passed = now - seconds;
  return passed < 5 ? "just now" : `${duration(passed < 60 ? Math.round(passed) : passed - (passed % 60)).replace(/ \d+ s$/, "")} ago`;
}

export function zone() {
  return Intl.DateTimeFormat().resolvedOptions().timeZone;
}
