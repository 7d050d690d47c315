// All runs in one table: live, filtered, sorted and searched here, picked for comparison.

import { get } from "../api.js";
import { spark } from "../chart.js";
import { code, empty, field, fill, h, keep, select } from "../dom.js";
import { go, link, note, runPath } from "../router.js";
import { ago, count, duration, moment, number, usd } from "../text.js";

const PAGE = 200;
const COLUMNS = [
  ["run_id", "Run", (run) => run.created_at],
  ["state", "State", (run) => run.state],
  ["progress", "Progress", (run) => (run.total_steps ? run.step / run.total_steps : 0)],
  ["model", "Model", (run) => run.model],
  ["environment", "Environment", (run) => run.environment],
  ["algorithm", "Algorithm", (run) => run.algorithm],
  ["value", "Reward or loss", (run) => run.value],
  ["cost", "Cost", (run) => run.cost_usd],
  ["age", "Age", (run) => -run.created_at],
];
const MOST = 6; // runs that a comparison holds

export async function show({ main, query, poll, signal }) {
  const runs = new Map();
  const rows = new Map();
  const picked = new Set();
  let newest = 0;
  let all = false;
  const view = {
    find: query.get("find") ?? "", state: query.get("state") ?? "", model: query.get("model") ?? "",
    environment: query.get("environment") ?? "", algorithm: query.get("algorithm") ?? "",
    sort: query.get("sort") ?? "run_id", up: query.get("up") === "1",
  };

  const search = h("input", { type: "search", value: view.find, oninput: () => change({ find: search.value }), placeholder: "id, model, environment …" });
  const filters = h("div", { class: "bar" });
  const body = h("tbody");
  const heads = h("tr");
  const status = h("p", { class: "quiet", role: "status" });
  const more = h("button", { hidden: true, onclick: older }, "Load older runs");
  const compare = h("button", { class: "main", disabled: true, onclick: () => go("/compare", { runs: [...picked].join(",") }) }, "Compare");
  const nothing = h("div");
  const board = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Runs" },
    h("table", { id: "runs" }, h("caption", { class: "unseen" }, "Runs, with state, progress, reward or loss, cost and age"), h("thead", null, heads), body));
  fill(main, h("div", { class: "bar" }, h("h1", { tabindex: "-1", class: "grow" }, "Runs"), compare, link("/start", {}, "Start a run")),
    h("div", { class: "bar" }, h("div", { class: "grow" }, field("Search", search)), filters), board, nothing, h("div", { class: "bar" }, status, more));

  function change(part) {
    Object.assign(view, part);
    note({ ...view, sort: view.sort === "run_id" ? "" : view.sort, up: view.up ? "1" : "" });
    draw();
  }

  function take(found) {
    for (const run of found) {
      runs.set(run.run_id, run);
      newest = Math.max(newest, run.updated_at);
    }
  }

  async function older() {
    more.disabled = true;
    const oldest = [...runs.values()].sort((a, b) => a.created_at - b.created_at)[0];
    const page = (await get("/api/overview", { limit: PAGE, before: oldest.run_id }, signal)).runs;
    take(page);
    all = page.length < PAGE;
    more.disabled = false;
    draw();
  }

  function fits(run) {
    const words = view.find.toLowerCase().split(/\s+/).filter(Boolean);
    const text = `${run.run_id} ${run.model} ${run.environment} ${run.algorithm} ${run.state} ${run.phase ?? ""}`.toLowerCase();
    return (!view.state || run.state === view.state) && (!view.model || run.model === view.model)
      && (!view.environment || run.environment === view.environment) && (!view.algorithm || run.algorithm === view.algorithm)
      && words.every((word) => text.includes(word));
  }

  function ordered() {
    const by = COLUMNS.find(([name]) => name === view.sort)?.[2] ?? COLUMNS[0][2];
    return [...runs.values()].filter(fits).sort((a, b) => {
      const [x, y] = [by(a), by(b)];
      if (x === null || y === null) return x === y ? 0 : x === null ? 1 : -1; // what has no value comes last
      const order = typeof x === "string" ? x.localeCompare(y) : x - y;
      return view.up ? order : -order;
    });
  }

  function draw() {
    const found = ordered();
    drawHeads();
    drawFilters();
    const keptRows = [];
    for (const run of found) {
      const row = rows.get(run.run_id) ?? h("tr");
      rows.set(run.run_id, row);
      keep(row, { ...run, age: ago(run.created_at), picked: picked.has(run.run_id) }, cells);
      keptRows.push(row);
    }
    if (keptRows.length !== body.children.length || keptRows.some((row, at) => body.children[at] !== row)) body.replaceChildren(...keptRows);
    board.hidden = !runs.size;
    status.textContent = runs.size ? `${count(found.length)} of ${count(runs.size)} runs${all ? "" : " loaded"}` : "";
    more.hidden = all || !runs.size;
    keep(nothing, [runs.size === 0, found.length === 0], ([none, unfit]) => {
      if (none) return empty("No run yet.", "Start one ", link("/start", {}, "in the form"), ", or from a terminal: ", code("flash train config.toml"), ". ", code("flash env setup"), " writes a first environment and config.");
      return unfit ? empty("No run fits.", h("button", { class: "plain", onclick: () => { search.value = ""; change({ find: "", state: "", model: "", environment: "", algorithm: "" }); } }, "Clear search and filters")) : null;
    });
    compare.disabled = picked.size < 2 || picked.size > MOST;
    compare.textContent = picked.size ? `Compare ${picked.size}` : "Compare";
    compare.title = picked.size > MOST ? `at most ${MOST} runs` : "Pick two to six runs";
  }

  function drawHeads() {
    keep(heads, [view.sort, view.up], () => [h("th", { scope: "col" }, h("span", { class: "unseen" }, "Pick")), ...COLUMNS.map(([name, label]) => {
      const here = view.sort === name;
      return h("th", { scope: "col", class: ["progress", "cost", "age"].includes(name) ? "number" : "", "aria-sort": here ? (view.up ? "ascending" : "descending") : "none" },
        h("button", { onclick: () => { change({ sort: name, up: here ? !view.up : false }); heads.querySelector(`[data-name="${name}"]`)?.focus(); }, dataset: { name } },
          label, here ? (view.up ? " ▲" : " ▼") : ""));
    })]);
  }

  function drawFilters() {
    const choices = Object.fromEntries(["state", "model", "environment", "algorithm"].map((name) =>
      [name, [...new Set([...runs.values()].map((run) => run[name])), ...(view[name] ? [view[name]] : [])].sort()]));
    keep(filters, [choices, view.state, view.model, view.environment, view.algorithm], () => Object.entries(choices).map(([name, values]) =>
      field(name[0].toUpperCase() + name.slice(1), select([["", "all"], ...new Set(values)], view[name], (value) => change({ [name]: value })))));
  }

  function cells(run) {
    const box = h("input", {
      type: "checkbox", checked: run.picked, "aria-label": `Pick ${run.run_id} for comparison`,
      onchange: () => { box.checked ? picked.add(run.run_id) : picked.delete(run.run_id); draw(); },
    });
    const steps = run.total_steps ? `${count(run.step)} of ${count(run.total_steps)}` : count(run.step);
    const metric = run.summary_metric;
    return [
      h("td", null, box),
      h("td", null, link(runPath(run.run_id), {}, run.run_id), run.deployed_step !== null ? h("span", { class: "tag good" }, `live: step ${run.deployed_step}`) : null),
      h("td", null, h("span", { class: `state ${run.state}` }, run.state), run.phase && run.state === "running" ? h("div", { class: "quiet" }, run.phase) : null),
      h("td", { class: "number" }, steps),
      h("td", null, run.model),
      h("td", null, link("/environment", { id: run.environment }, run.environment)),
      h("td", null, run.algorithm),
      h("td", null, run.value === null ? "–" : h("span", { title: metric }, `${metric} ${number(run.value)}`),
        run.eval?.adapter !== undefined ? h("div", { class: "quiet" }, `held out ${number(run.eval.base)} → ${number(run.eval.adapter)}`) : null,
        spark(run.spark, `${metric} over the run, from ${number(run.spark[0])} to ${number(run.spark.at(-1))}`)),
      h("td", { class: "number" }, usd(run.cost_usd), run.estimated_cost_usd ? h("div", { class: "quiet" }, `of ${usd(run.estimated_cost_usd)}`) : null),
      h("td", { class: "number" }, h("span", { title: moment(run.created_at).textContent }, run.age),
        run.finished_at ? h("div", { class: "quiet" }, `took ${duration(run.finished_at - run.created_at)}`) : null),
    ];
  }

  let first = true;
  await poll(async () => {
    const found = (await get("/api/overview", first ? { limit: PAGE } : { since: newest, limit: 1000 }, signal)).runs;
    if (first) all = found.length < PAGE;
    first = false;
    take(found);
    draw();
    return [...runs.values()].some((run) => !["done", "failed", "cancelled"].includes(run.state)) ? 3 : 6;
  });
}
