// A run's config as it was decided: every value, those that the recipe filled in marked, and as TOML to use again.

import { get } from "../api.js";
import { fill, h, table } from "../dom.js";
import { link } from "../router.js";
import { long, plain, shown } from "../text.js";

export async function open({ id, body, signal, run }) {
  const { config } = await get(`/api/runs/${encodeURIComponent(id)}/lineage`, {}, signal);
  const given = toml(config);
  fill(body, h("p", null, h("span", { class: "default" }, "Grey values"), " were left out and come from the recipe. ", link("/start", { from: id }, "Start one like it"), "."),
    table("Config", ["Key", "Value", "From"], rows(run.spec).map(([key, value, isDefault]) =>
      h("tr", null, h("th", { scope: "row", class: "mono" }, key), h("td", { class: `mono${isDefault ? " default" : ""}` }, long(plain(value))), h("td", { class: "quiet" }, isDefault ? "recipe" : "config")))),
    h("h2", null, "As it was submitted"), h("div", { class: "card" }, h("pre", { tabindex: "0", "aria-label": "Config as TOML" }, shown(given))));
  return { async update() {} };
}

/** [key, value, whether it was left out], for every value of a spec that has one. */
export function rows(spec) {
  const defaulted = new Set(spec.defaulted ?? []);
  const found = [];
  for (const [section, value] of Object.entries(spec)) {
    if (section === "defaulted" || value === null) continue;
    if (typeof value !== "object" || Array.isArray(value)) found.push([section, value, defaulted.has(section)]);
    else for (const [name, inner] of Object.entries(value)) {
      if (inner === null) continue;
      const key = `${section}.${name}`;
      found.push([key, inner, defaulted.has(key) || section === "recipe"]);
    }
  }
  return found;
}

/** TOML of a config's tables. */
export function toml(config) {
  const lines = [];
  const tables = [];
  for (const [key, value] of Object.entries(config)) {
    if (isTable(value)) tables.push([key, value]);
    else if (value !== null) lines.push(`${name(key)} = ${literal(value)}`);
  }
  for (const [key, value] of tables) {
    const inner = Object.entries(value).filter(([, each]) => each !== null);
    if (!inner.length) continue;
    lines.push("", `[${name(key)}]`);
    for (const [at, each] of inner.filter(([, each]) => !isTable(each))) lines.push(`${name(at)} = ${literal(each)}`);
    for (const [at, each] of inner.filter(([, each]) => isTable(each))) if (Object.keys(each).length) lines.push("", `[${name(key)}.${name(at)}]`, ...Object.entries(each).map(([k, v]) => `${name(k)} = ${literal(v)}`));
  }
  return `${lines.join("\n").trim()}\n`;
}

function isTable(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}

function name(key) {
  return /^[\w-]+$/.test(key) ? key : JSON.stringify(key);
}

function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (isTable(value)) return `{ ${Object.entries(value).map(([key, each]) => `${name(key)} = ${literal(each)}`).join(", ")} }`;
  if (typeof value === "number") return Number.isInteger(value) || String(value).includes(".") || String(value).includes("e") ? String(value) : `${value}.0`;
  return JSON.stringify(value);
}
