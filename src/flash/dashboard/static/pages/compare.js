// Two to six runs side by side: their metrics on shared axes, what differs in their configs, in their environments.

import { get } from "../api.js";
import { Chart } from "../chart.js";
import { empty, field, fill, h, keep, select, table } from "../dom.js";
import { inOrder, titleOf } from "../metrics.js";
import { go, link, note, runPath } from "../router.js";
import { clock, count, duration, number, plain, shown, usd } from "../text.js";
import { rows } from "./config.js";
import { differences } from "./environment.js";

const MOST = 6;
const ENDED = new Set(["done", "failed", "cancelled"]);

export async function show({ main, query, signal, poll, title }) {
  const ids = (query.get("runs") ?? "").split(",").map((id) => id.trim()).filter(Boolean);
  let weight = Number(query.get("smooth") ?? 0);
  let axis = query.get("x") ?? "step";
  title("Compare runs");
  const bar = h("div", { class: "bar" });
  const legend = h("ul", { class: "legend", "aria-label": "Runs" });
  const facts = h("div");
  const grid = h("div", { class: "cards", id: "charts" });
  const config = h("div");
  const code = h("div");
  const slider = h("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: weight, oninput: () => { weight = Number(slider.value); note({ smooth: weight || "" }); draw(); } });
  fill(main, h("h1", { tabindex: "-1" }, "Compare runs"), bar);
  const recent = (await get("/api/overview", { limit: 200 }, signal)).runs.map((run) => run.run_id).filter((id) => !ids.includes(id));
  const adder = select([["", "choose …"], ...recent], "", (id) => { if (id) go("/compare", { runs: [...ids, id].join(",") }); });
  fill(bar, ids.length < MOST ? field("Add a run", adder) : null, field("Smoothing", slider),
    field("Along", select([["step", "steps"], ["time", "time since the start"]], axis, (value) => { axis = value; note({ x: value === "step" ? "" : value }); draw(); })));
  if (ids.length < 2) {
    main.append(legend, empty(ids.length ? "One run is chosen." : "No run is chosen.", "Choose two to six: here, or by the boxes in the ", link("", {}, "table of runs"), "."));
    return;
  }
  if (ids.length > MOST) {
    main.append(empty("That is too many.", `Compare at most ${MOST} runs; ${ids.length} are named in the address.`));
    return;
  }
  main.append(legend, h("h2", null, "At a glance"), facts, h("h2", null, "Metrics"), grid, h("h2", null, "Configs"), config, h("h2", null, "Environments"), code);

  const charts = new Map();
  let runs = [];
  let series = [];

  function draw() {
    const names = [...new Set(series.flatMap((each) => Object.keys(each.curves)))].filter((name) => !name.startsWith("seconds_"));
    const many = (name) => series.filter((each) => name in each.curves).length;
    names.sort((a, b) => many(b) - many(a) || inOrder(a, b));
    for (const name of names) {
      if (!charts.has(name)) {
        charts.set(name, new Chart(titleOf(name)));
        charts.get(name).node.dataset.metric = name;
        grid.append(charts.get(name).node);
      }
      const lines = series.flatMap((each, at) => (name in each.curves ? [{ label: runs[at].run_id, colour: at, values: each.curves[name].mean, x: axis === "step" ? each.steps : each.times.map((time) => time - runs[at].created_at) }] : []));
      charts.get(name).update({ x: [], lines, weight, xname: axis === "time" ? duration : undefined });
    }
  }

  await poll(async () => {
    const path = (id) => `/api/runs/${encodeURIComponent(id)}`;
    const fresh = await Promise.all(ids.map((id) => get(path(id), {}, signal)));
    const changed = fresh.some((run, at) => run.updated_at !== runs[at]?.updated_at);
    runs = fresh;
    if (changed) {
      const lineages = await Promise.all(ids.map((id) => get(`${path(id)}/lineage`, {}, signal)));
      series = await Promise.all(ids.map((id) => get(`${path(id)}/series`, { points: 250 }, signal)));
      keep(legend, ids, () => runs.map((run, at) => h("li", null, h("span", { class: `t${at}` }, h("span", { class: "swatch" })), link(runPath(run.run_id), {}, run.run_id), " ", h("button", { class: "plain", "aria-label": `Leave out ${run.run_id}`, onclick: () => go("/compare", { runs: ids.filter((id) => id !== run.run_id).join(",") }) }, "×"))));
      keep(facts, runs.map((run) => [run.state, run.step, run.metrics, run.cost_usd]), () => glance(runs));
      draw();
      keep(config, runs.map((run) => run.spec), () => configs(runs));
      const versions = lineages.map((each) => `${each.environment}@${each.environment_sha256}`);
      if (JSON.stringify(versions) !== code.dataset.versions) {
        code.dataset.versions = JSON.stringify(versions);
        fill(code, await environments(ids, versions, signal));
      }
    }
    return runs.every((run) => ENDED.has(run.state)) ? null : 3;
  });
}

function glance(runs) {
  const lines = [
    ["State", (run) => h("span", { class: `state ${run.state}` }, run.state)],
    ["Submitted", (run) => clock(run.created_at)],
    ["Step", (run) => `${count(run.step)}${run.total_steps ? ` of ${count(run.total_steps)}` : ""}`],
    ["Reward", (run) => number(run.metrics.reward)],
    ["Loss", (run) => number(run.metrics.loss)],
    ["Held out, base", (run) => number(run.metrics.eval?.base)],
    ["Held out, adapter", (run) => number(run.metrics.eval?.adapter)],
    ["Time", (run) => duration(run.managed.active_s)],
    ["Cost", (run) => usd(run.cost_usd)],
  ];
  return table("The runs at a glance", ["", ...runs.map((run) => run.run_id)], lines.map(([name, value]) => h("tr", null, h("th", { scope: "row" }, name), runs.map((run) => h("td", null, value(run))))));
}

function configs(runs) {
  const all = runs.map((run) => new Map(rows(run.spec).map(([key, value, isDefault]) => [key, [plain(value), isDefault]])));
  const keys = [...new Set(all.flatMap((each) => [...each.keys()]))];
  const differs = (key) => new Set(all.map((each) => each.get(key)?.[0])).size > 1;
  const different = keys.filter(differs);
  const draw = (list) => table("Configs", ["Key", ...runs.map((run) => run.run_id)], list.map((key) => h("tr", null, h("th", { scope: "row", class: "mono" }, key),
    all.map((each) => h("td", { class: `mono ${differs(key) ? "differs" : ""} ${each.get(key)?.[1] ? "default" : ""}` }, shown(each.get(key)?.[0] ?? "–"))))));
  const same = keys.filter((key) => !differs(key));
  return [different.length ? draw(different) : h("p", null, "The configs are equal."), h("details", null, h("summary", null, `${same.length} keys are the same`), draw(same))];
}

async function environments(ids, versions, signal) {
  const parts = [];
  for (const [at, version] of versions.entries()) {
    if (at === 0) continue;
    if (version === versions[0]) {
      parts.push(h("p", null, `${ids[at]} runs on the same version as ${ids[0]}.`));
      continue;
    }
    parts.push(h("h3", null, `${ids[0]} → ${ids[at]}`));
    try {
      parts.push(differences(await get("/api/packages/diff", { before: versions[0], after: version }, signal)));
    } catch (error) {
      if (error.name === "AbortError") throw error;
      parts.push(h("p", { class: "warn" }, error.message));
    }
  }
  return parts;
}
