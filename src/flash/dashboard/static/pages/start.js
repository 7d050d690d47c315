// A form for a new run, made from the configuration's own declaration, with what the run would come to beside it.
// What is left empty is the recipe's to decide, and shown as such.

import { get, post } from "../api.js";
import { announce, code, empty, field, fill, h, keep, select, table } from "../dom.js";
import { go, link, runPath } from "../router.js";
import { bytes, count, duration, number, plain, prose, shown, usd } from "../text.js";
import { rows, toml } from "./config.js";

const PAUSE = 350; // ms after the last key before the plan is asked for
const SECTIONS = { "": "Run", environment: "Environment", train: "Training", wandb: "Weights & Biases", other: "Advanced" };

export async function show({ main, query, signal, title }) {
  title("Start a run");
  const from = query.get("from");
  const [form, { models }, { environments }, source] = await Promise.all([get("/api/config/form", {}, signal), get("/api/models", {}, signal), get("/api/environments", {}, signal),
    from ? get(`/api/runs/${encodeURIComponent(from)}/lineage`, {}, signal) : null]);
  const given = structuredClone(source?.config ?? {});
  if (query.get("model")) given.model = query.get("model");
  if (query.get("environment")) given.environment = { ...given.environment, id: query.get("environment") };
  given.model ??= models[0]?.id;
  const state = new Map(); // dotted key → what stands in its control
  const controls = new Map();
  const seed = h("input", { type: "number", min: 0, value: 0, step: 1, oninput: changed });
  const secrets = h("div");
  const secretValues = new Map();
  const plan = h("aside", { "aria-label": "What the run comes to" }, h("p", { class: "quiet" }, "…"));
  const problem = h("div", { role: "alert" });
  const submit = h("button", { class: "main" }, "Start the run");
  let timer = null;
  let asked = 0;

  const groups = Object.entries(SECTIONS).map(([section, label]) => {
    const keys = form.keys.filter((key) => place(key) === section);
    return h(section === "wandb" || section === "other" ? "details" : "fieldset", null, h(section === "wandb" || section === "other" ? "summary" : "legend", null, label), keys.map(control),
      section === "" ? field("seed", seed, "Decides all randomness of the run; recorded with it.") : null, section === "environment" ? secrets : null);
  });
  fill(main, h("h1", { tabindex: "-1" }, "Start a run"), from ? h("p", null, "Filled in from ", link(runPath(from), {}, from), ".") : null,
    environments.length ? null : empty("No environment was pushed yet.", "A run needs one: ", code("flash env setup"), ", then ", code("flash env push --name NAME"), "."),
    h("div", { class: "form-columns" }, h("form", { onsubmit: start }, groups, problem, h("div", { class: "bar" }, submit)), plan));
  changed();

  function place(key) {
    if (key.section === "" && key.type === "table") return "other";
    return key.section in SECTIONS ? key.section : "other";
  }

  function control(key) {
    const dotted = key.section ? `${key.section}.${key.name}` : key.name;
    const value = key.section ? given[key.section]?.[key.name] : given[key.name];
    const text = value === undefined || value === null ? "" : written(key, value);
    state.set(dotted, text);
    const take = (node) => { state.set(dotted, node.type === "checkbox" ? (node.checked ? "true" : "") : node.value); changed(); };
    let node;
    if (dotted === "model") node = select(models.map((model) => [model.id, `${model.id} (${model.size})`]), text, () => take(node));
    else if (dotted === "algorithm") node = select([["sft", "SFT: imitate examples"], ["grpo", "GRPO: learn from a reward"]], text || "sft", () => take(node));
    else if (dotted === "environment.id") {
      const list = h("datalist", { id: "environments" }, environments.map((each) => h("option", { value: `${each.namespace}/${each.name}` })));
      node = h("input", { value: text, list: "environments", required: true, autocomplete: "off", spellcheck: "false", oninput: () => take(node) });
      main.append(list);
      queueMicrotask(() => node.after(list));
    } else if (key.type === "bool") node = h("input", { type: "checkbox", checked: text === "true", onchange: () => take(node) });
    else if (key.type === "table" || key.type === "list[string]") node = h("textarea", { rows: 2, value: text, spellcheck: "false", placeholder: key.type === "table" ? "name = value, one a line" : "one a line", oninput: () => take(node) });
    else node = h("input", { value: text, inputmode: key.type === "int" ? "numeric" : key.type === "float" ? "decimal" : "text", autocomplete: "off", spellcheck: "false", oninput: () => take(node) });
    const wrong = h("small", { class: "bad", id: `wrong-${dotted}` });
    const row = field(key.name, node, [prose(key.text), key.rule ? ` Range: ${key.rule}.` : ""]);
    row.append(wrong);
    controls.set(dotted, { key, node, row, wrong });
    return row;
  }

  function config() {
    const found = {};
    for (const [dotted, text] of state) {
      const { key, row } = controls.get(dotted);
      if (text.trim() === "" || row.hidden) continue;
      const target = key.section ? (found[key.section] ??= {}) : found;
      target[key.name] = read(key, text);
    }
    return found;
  }

  function changed() {
    const algorithm = state.get("algorithm") || "sft";
    const recipe = { ...form.recipes[algorithm][""], ...form.recipes[algorithm][state.get("model")] };
    for (const [dotted, { key, node, row }] of controls) {
      row.hidden = Boolean(key.algorithm) && key.algorithm !== algorithm;
      if (key.section === "train" && node.tagName === "INPUT" && node.type !== "checkbox") node.placeholder = plain(recipe[key.name] ?? key.default) || "–";
      else if (dotted === "algorithm") state.set(dotted, algorithm);
    }
    const names = lines(state.get("environment.secrets") ?? "");
    keep(secrets, names, () => names.map((name) => {
      const node = h("input", { type: "password", autocomplete: "off", value: secretValues.get(name) ?? "", oninput: () => secretValues.set(name, node.value) });
      return field(`Value of ${name}`, node, "Sealed at rest, deleted when the run ends.");
    }));
    clearTimeout(timer);
    timer = setTimeout(look, PAUSE);
  }

  async function look() {
    const mine = ++asked;
    try {
      const found = await post("/api/plan", { config: config(), seed: Number(seed.value) || 0 }, { signal });
      if (mine !== asked) return;
      mark([]);
      fill(plan, summary(found), asToml(config()));
    } catch (error) {
      if (error.name === "AbortError" || mine !== asked) return;
      const problems = error.message.split("\n");
      const rest = mark(problems);
      fill(plan, h("h2", null, "Not yet right"), h("ul", null, problems.map((text) => h("li", { class: rest.includes(text) ? "bad" : "" }, shown(text)))), asToml(config()));
    }
  }

  /** Puts each problem at its control; returns those that belong to none. */
  function mark(problems) {
    const rest = [];
    for (const { wrong, node } of controls.values()) { wrong.textContent = ""; node.removeAttribute("aria-invalid"); }
    for (const text of problems) {
      const dotted = /^([\w.]+)/.exec(text)?.[1];
      const found = controls.get(dotted);
      if (!found) { rest.push(text); continue; }
      found.wrong.textContent = text;
      found.node.setAttribute("aria-invalid", "true");
    }
    return rest;
  }

  async function start(event) {
    event.preventDefault();
    submit.disabled = true;
    fill(problem);
    try {
      const names = lines(state.get("environment.secrets") ?? "");
      const body = { config: config(), seed: Number(seed.value) || 0, secrets: Object.fromEntries(names.map((name) => [name, secretValues.get(name) ?? ""]).filter(([, value]) => value)) };
      const run = await post("/api/runs", body, { headers: { "Idempotency-Key": crypto.randomUUID() } });
      announce("The run is submitted.");
      go(runPath(run.run_id));
    } catch (error) {
      mark(error.message.split("\n"));
      fill(problem, h("p", { class: "bad" }, h("strong", null, "Not submitted. "), shown(error.message), error.remedy ? ` (${error.remedy})` : ""));
      submit.disabled = false;
    }
  }
}

function lines(text) {
  return text.split("\n").map((line) => line.trim()).filter(Boolean);
}

/** A value as it stands in its control. */
function written(key, value) {
  if (key.type === "list[string]") return [value].flat().join("\n");
  if (key.type === "table") return Object.entries(value).map(([name, each]) => `${name} = ${typeof each === "string" ? each : JSON.stringify(each)}`).join("\n");
  return String(value);
}

/** A control's text as the config takes it; what is not of its type goes as text, and the server says what is wrong. */
function read(key, text) {
  const trimmed = text.trim();
  if (key.type === "bool") return trimmed === "true";
  if (key.type === "int" || key.type === "float") return /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(trimmed) ? Number(trimmed) : trimmed;
  if (key.type === "list[string]") return lines(text);
  if (key.type === "table") {
    return Object.fromEntries(lines(text).map((line) => {
      const [name, ...rest] = line.split("=");
      return [name.trim(), key.name === "worker_env" ? rest.join("=").trim() : value(rest.join("=").trim())];
    }));
  }
  return trimmed;
}

function value(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function summary(plan) {
  const { estimate, spec } = plan;
  return [
    h("h2", null, "What it comes to"),
    plan.problem ? h("p", { class: "bad" }, shown(plan.problem)) : null,
    plan.warnings.map((text) => h("p", { class: "warn" }, shown(text))),
    estimate ? h("dl", { class: "facts" },
      ["Here", estimate.hardware, "Time", duration(estimate.wall_clock_s), "Steps", `${count(estimate.steps)} of ${number(estimate.seconds_per_step)} s`, "Rows", count(estimate.rows), "Memory", `${bytes(estimate.memory_bytes)} of ${bytes(estimate.hardware_memory_bytes)}`, "Cost", usd(estimate.usd), "Time limit", duration(plan.wall_clock_limit_s)]
        .map((each, at) => h(at % 2 ? "dd" : "dt", null, each))) : h("p", { class: "quiet" }, "Nothing can be estimated."),
    estimate?.assumptions?.length ? h("p", { class: "quiet" }, `Assumed: ${estimate.assumptions.join("; ")}.`) : null,
    plan.alternatives.length ? h("details", null, h("summary", null, "On rented GPUs, for comparison"), table("Reference prices", ["GPU", "#Time", "#Cost"], plan.alternatives.map((each) => h("tr", null, h("th", { scope: "row" }, each.hardware), h("td", { class: "number" }, duration(each.wall_clock_s)), h("td", { class: "number" }, usd(each.usd)))))) : null,
    h("details", null, h("summary", null, "Every value (dry run)"), table("Every value", ["Key", "Value"], rows(spec).map(([key, each, isDefault]) => h("tr", null, h("th", { scope: "row", class: "mono" }, key), h("td", { class: `mono ${isDefault ? "default" : ""}` }, shown(plain(each))))))),
  ];
}

function asToml(config) {
  return h("details", null, h("summary", null, "As TOML, for the command line"), h("div", { class: "card" }, h("pre", { tabindex: "0", "aria-label": "Config as TOML" }, shown(toml(config)))));
}
