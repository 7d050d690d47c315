// A run's overview: charts, attempts and phases on a timeline, checkpoints with deploy buttons, estimate beside actual,
// lineage. Charts are refreshed with what is new alone.

import { get, post } from "../api.js";
import { Chart } from "../chart.js";
import { empty, fact, field, fill, h, keep, table } from "../dom.js";
import { inOrder, titleOf } from "../metrics.js";
import { environmentLink, link, note, runPath } from "../router.js";
import { bytes, clock, count, duration, moment, number, usd } from "../text.js";

const POINTS = 300;
const JOINED = { seconds: ["seconds_sampling", "seconds_scoring", "seconds_update"] };
const HIDDEN = new Set(["reward_std", "peak_memory_bytes", "seconds_sampling", "seconds_scoring", "seconds_update"]);
const LOGARITHMIC = new Set(["learning_rate"]);

export async function open({ id, body, signal, query }) {
  const path = `/api/runs/${encodeURIComponent(id)}`;
  const charts = new Map();
  let series = null;
  let zoom = query.get("from") ? [Number(query.get("from")), Number(query.get("to"))] : null;
  let weight = Number(query.get("smooth") ?? localStorage.getItem("flash.smooth") ?? 0);
  const events = [];

  const slider = h("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: weight, oninput: () => { weight = Number(slider.value); localStorage.setItem("flash.smooth", weight); note({ smooth: weight || "" }); drawCharts(); } });
  const whole = h("button", { hidden: !zoom, onclick: () => zoomTo(null) }, "Show all steps");
  const grid = h("div", { class: "cards", id: "charts" });
  const nothing = h("div");
  const timeline = h("div");
  const checkpoints = h("div");
  const estimate = h("div");
  const lineage = h("div");
  fill(body,
    h("div", { class: "bar" }, h("h2", { class: "grow" }, "Charts"), field("Smoothing", slider), whole),
    h("p", { class: "quiet" }, "Drag over a chart to zoom into steps; double-click shows all again. Shaded: extremes of the steps that a point stands for."),
    grid, nothing,
    h("h2", null, "Attempts"), timeline,
    h("div", { class: "columns" }, h("section", null, h("h2", null, "Checkpoints"), checkpoints), h("section", null, h("h2", null, "Estimate and actual"), estimate)),
    h("h2", null, "Where it comes from, what came of it"), lineage);

  async function zoomTo(from, to) {
    zoom = from === null ? null : [from, to];
    whole.hidden = !zoom;
    note({ from: zoom?.[0] ?? "", to: zoom?.[1] ?? "" });
    series = await get(`${path}/series`, { points: POINTS, first: zoom?.[0], last: zoom?.[1] }, signal);
    drawCharts();
  }

  function drawCharts() {
    const names = Object.keys(series.curves).filter((name) => !HIDDEN.has(name));
    names.sort(inOrder);
    for (const name of names) {
      if (!charts.has(name)) {
        const made = new Chart(name === "reward" ? "Reward, with its spread" : titleOf(name), { onzoom: zoomTo });
        made.node.dataset.metric = name;
        charts.set(name, made);
        const after = names.slice(0, names.indexOf(name)).findLast((each) => charts.has(each));
        after ? charts.get(after).node.after(made.node) : grid.prepend(made.node);
      }
      const lines = [name in JOINED ? { ...line(name, 0), label: "all", low: null, high: null } : line(name, 0)];
      for (const [at, joined] of (JOINED[name] ?? []).entries()) {
        if (series.curves[joined]) lines.push({ ...line(joined, at + 1), label: joined.replace("seconds_", "") });
      }
      charts.get(name).update({ x: series.steps, lines, weight, log: LOGARITHMIC.has(name) && series.curves[name].mean.some((value) => value > 0), from: zoom?.[0], to: zoom?.[1], legend: true });
    }
    keep(nothing, [names.length === 0], ([none]) => (none ? empty("Nothing reported yet.", "Metrics appear with the first step; what happens until then is in the ", link(runPath(id, "log"), {}, "log"), ".") : null));
  }

  function line(name, colour) {
    const curve = series.curves[name];
    let { low, high } = curve;
    const spread = name === "reward" ? series.curves.reward_std : null;
    if (spread) {
      low = curve.mean.map((value, at) => (value === null ? null : value - (spread.mean[at] ?? 0)));
      high = curve.mean.map((value, at) => (value === null ? null : value + (spread.mean[at] ?? 0)));
    }
    return { label: titleOf(name), colour, values: curve.mean, low, high };
  }

  async function updateCharts() {
    if (!series || zoom || series.steps.length > POINTS * 1.5) {
      series = await get(`${path}/series`, { points: POINTS, first: zoom?.[0], last: zoom?.[1] }, signal);
    } else {
      const last = series.steps.at(-1) ?? 0;
      const fresh = await get(`${path}/series`, { points: POINTS, first: last }, signal);
      join(series, fresh, last);
    }
    drawCharts();
  }

  async function updateTimeline(run) {
    const after = events.at(-1)?.seq ?? 0;
    const page = await get(`${path}/events`, { after, kinds: "state,attempt,phase,checkpoint", limit: 5000 }, signal);
    events.push(...page.events);
    fill(timeline, attempts(run, events));
  }

  async function updateLineage(run) {
    const found = await get(`${path}/lineage`, {}, signal);
    keep(lineage, [found, run.checkpoints.length, run.state], () => chain(run, found));
    keep(checkpoints, [run.checkpoints, found.deployed_step, run.adapter_ref], () => saves(run, found));
    estimated = found.estimate;
  }

  // While steps go by, their metrics alone are new: ten readers must not slow a run down.
  let milestone = "";
  let estimated = null;
  return {
    async update(run) {
      const now = JSON.stringify([run.state, run.phase, run.attempts, run.checkpoints]);
      const passed = now !== milestone;
      await Promise.all([updateCharts(), ...(passed ? [updateTimeline(run), updateLineage(run)] : [])]);
      milestone = now;
      keep(estimate, [estimated, run.managed.active_s, run.step, run.cost_usd, run.state], () => beside(run, estimated));
    },
  };
}

/** Puts what was reported from step `last` on behind what is there. */
function join(series, fresh, last) {
  let kept = series.steps.length;
  while (kept && series.steps[kept - 1] >= last) kept--;
  const names = new Set([...Object.keys(series.curves), ...Object.keys(fresh.curves)]);
  for (const name of names) {
    const old = series.curves[name] ?? { mean: Array(series.steps.length).fill(null), low: null, high: null };
    const add = fresh.curves[name] ?? { mean: Array(fresh.steps.length).fill(null), low: null, high: null };
    const joined = { mean: [...old.mean.slice(0, kept), ...add.mean], low: null, high: null };
    if (old.low || add.low) {
      joined.low = [...(old.low ?? old.mean).slice(0, kept), ...(add.low ?? add.mean)];
      joined.high = [...(old.high ?? old.mean).slice(0, kept), ...(add.high ?? add.mean)];
    }
    series.curves[name] = joined;
  }
  series.steps = [...series.steps.slice(0, kept), ...fresh.steps];
  series.times = [...series.times.slice(0, kept), ...fresh.times];
  Object.assign(series, { events: fresh.events, last_step: fresh.last_step });
}

function attempts(run, events) {
  if (!run.attempts.length) return empty("No attempt yet.", run.next);
  const now = run.finished_at ?? Date.now() / 1000;
  const start = run.attempts[0].started_at ?? run.created_at;
  const end = Math.max(...run.attempts.map((each) => each.ended_at ?? now), start + 1);
  const told = [];
  const bars = run.attempts.map((attempt) => {
    const phases = events.filter((event) => event.kind === "phase" && event.epoch === attempt.epoch && event.data.phase)
      .filter((event, at, list) => !at || list[at - 1].data.phase !== event.data.phase);
    const from = attempt.started_at ?? start;
    const to = attempt.ended_at ?? now;
    const parts = phases.map((event, at) => [event.data.phase, event.time, phases[at + 1]?.time ?? to]);
    const bar = h("div", { class: "phases", "aria-hidden": "true" });
    const lead = h("span");
    lead.style.width = `${((from - start) / (end - start)) * 100}%`;
    bar.append(lead);
    for (const [phase, since, until] of parts.length ? parts : [[attempt.phase ?? attempt.state, from, to]]) {
      const block = h("span", { class: `phase ${phase}`, title: `${phase}: ${duration(until - since)}` }, phase);
      block.style.width = `${(Math.max(0, until - since) / (end - start)) * 100}%`;
      bar.append(block);
      told.push(h("li", null, clock(since), ` attempt ${attempt.epoch}: ${phase}, ${duration(Math.max(0, until - since))}`));
    }
    if (attempt.failure) told.push(h("li", null, attempt.ended_at ? clock(attempt.ended_at) : "", ` attempt ${attempt.epoch} ended: ${attempt.failure.replaceAll("_", " ")}${attempt.message ? `: ${attempt.message}` : ""}`));
    return h("div", { class: "attempt" }, h("span", null, `Attempt ${attempt.epoch} `, h("span", { class: "quiet" }, attempt.device ?? "")), bar);
  });
  const saves = events.filter((event) => event.kind === "checkpoint");
  return [bars, h("details", { open: run.attempts.length > 1 }, h("summary", null, "What happened when"), h("ol", { class: "mentions" },
    h("li", null, moment(run.created_at), " submitted"), told,
    saves.slice(-20).map((event) => h("li", null, clock(event.time), ` checkpoint at step ${count(event.data.step)}`)),
    run.finished_at ? h("li", null, clock(run.finished_at), ` ${run.state}`) : null))];
}

function saves(run, lineage) {
  if (!run.checkpoints.length) return empty("No checkpoint yet.", `One is saved every ${count(run.spec.train.save_every)} steps and at the end.`);
  return table("Checkpoints", ["#Step", "Reference", "Serve"], run.checkpoints.toReversed().map((ref) => {
    const step = Number(ref.split("step-")[1]);
    const live = lineage.deployed_step === step;
    return h("tr", null, h("td", { class: "number" }, count(step), ref === run.adapter_ref ? " (final)" : ""), h("td", { class: "mono" }, ref),
      h("td", null, live ? h("span", { class: "tag good" }, "live") : deployButton(run.run_id, step)));
  }));
}

/** Deploys a step: asks again while the server says that it waits, and shows what it waits for. */
export function deployButton(id, step, after = () => location.reload()) {
  const said = h("span", { class: "quiet", role: "status" });
  const button = h("button", {
    onclick: async () => {
      button.disabled = true;
      try {
        let answer;
        do {
          answer = await post("/api/deployments", { run_id: id, step });
          fill(said, answer.state === "waiting" ? ` ${answer.wait ?? "waiting"} …` : "");
          if (answer.state === "waiting") await new Promise((done) => setTimeout(done, 500));
        } while (answer.state === "waiting");
        after(answer);
      } catch (error) {
        fill(said, h("span", { class: "bad" }, ` ${error.message}${error.remedy ? ` (${error.remedy})` : ""}`));
        button.disabled = false;
      }
    },
  }, "Deploy");
  return h("span", null, button, said);
}

function beside(run, estimate) {
  if (!estimate) return h("p", { class: "quiet" }, "Nothing could be estimated for this model.");
  const done = run.state === "done";
  const rows = [
    ["Time", duration(estimate.wall_clock_s), duration(run.managed.active_s)],
    ["Steps", count(estimate.steps), count(run.step)],
    ["Seconds a step", number(estimate.seconds_per_step), number(run.metrics.seconds)],
    ["Cost", usd(estimate.usd), usd(run.cost_usd)],
    ["Memory", bytes(estimate.memory_bytes), bytes(run.metrics.peak_memory_bytes)],
  ];
  return [table("Estimate and actual", ["", "#Estimated", done ? "#Actual" : "#So far"], rows.map(([name, ...values]) =>
    h("tr", null, h("th", { scope: "row" }, name), values.map((value) => h("td", { class: "number" }, value))))),
  h("p", { class: "quiet" }, `Estimated for ${estimate.hardware}. `, estimate.assumptions?.length ? `Assumed: ${estimate.assumptions.join("; ")}.` : "")];
}

function chain(run, lineage) {
  const parent = lineage.retry_of ?? lineage.init_run_id;
  return [h("dl", { class: "facts" },
    fact("Environment", environmentLink(lineage.environment, lineage.environment_sha256, `${lineage.environment}@${lineage.environment_sha256.slice(0, 12)}`)),
    fact("Data", run.spec.environment.params?.dataset_path ?? `split ${run.spec.environment.params?.split ?? "train"}`),
    fact("Began from", parent ? [link(runPath(parent), {}, parent), lineage.retry_of ? " (its exact state: a retry)" : ` (weights of step ${lineage.init_step})`] : `${run.spec.model}, untrained`),
    fact("Adapter", run.adapter_ref ? h("span", { class: "mono" }, run.adapter_ref) : run.checkpoints.length ? `newest: ${run.checkpoints.at(-1)}` : "none yet"),
    fact("Deployed", lineage.deployed_step === null ? ["no: ", link("/models", {}, "models")] : [link("/models", {}, `step ${lineage.deployed_step}`), ", ", link("/playground", { model: run.run_id }, "playground")]),
    fact("Files", h("span", { class: "mono" }, run.managed.artifact_uri ?? "–"))),
  lineage.came_of.length ? h("ul", null, lineage.came_of.map((kin) => h("li", null, link(runPath(kin.run_id), {}, kin.run_id), ` ${kin.how}${kin.step !== null ? ` from step ${kin.step}` : ""}, ${kin.state}`))) : h("p", { class: "quiet" }, "No run began from this one."),
  ];
}
