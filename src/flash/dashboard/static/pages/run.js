// One run: what happens and happened, in tabs that each have an address. This module owns the head and what all tabs
// share (the run's status, asked for while the page is open); the tabs are modules of their own.

import { ApiError, get, post } from "../api.js";
import { announce, fact, fill, h, keep } from "../dom.js";
import { environmentLink, go, link, runPath } from "../router.js";
import { ago, count, duration, long, moment, number, prose, shown, usd } from "../text.js";

const TABS = [["", "Overview", () => import("./overview.js")], ["samples", "Samples", () => import("./samples.js")],
  ["log", "Log", () => import("./log.js")], ["config", "Config", () => import("./config.js")]];
const ENDED = new Set(["done", "failed", "cancelled"]);

export async function show(page) {
  const { main, parts, signal, poll, title } = page;
  const [id, tab = ""] = parts;
  const chosen = TABS.find(([name]) => name === tab);
  if (!chosen) throw new ApiError(404, { message: `a run has no page ${tab}` });
  title(`${chosen[1]} · ${id}`);
  const head = h("div");
  const actions = h("div", { class: "bar" });
  const body = h("div");
  fill(main, head, actions, h("nav", { class: "tabs", "aria-label": "Parts of the run" }, TABS.map(([name, label]) => {
    const node = link(runPath(id, name), {}, label);
    if (name === tab) node.setAttribute("aria-current", "page");
    return node;
  })), body);

  const loading = chosen[2]();
  const part = {};
  let told = null;
  await poll(async () => {
    const run = await get(`/api/runs/${encodeURIComponent(id)}`, {}, signal);
    const changed = run.updated_at !== told;
    keep(head, { ...run, age: ENDED.has(run.state) ? null : ago(run.created_at) }, header);
    keep(actions, [run.state, run.run_id], () => buttons(run));
    if (!part.update) Object.assign(part, await (await loading).open({ ...page, id, body, run }));
    if (changed) await part.update(run);
    told = run.updated_at;
    return ENDED.has(run.state) ? 15 : 3;
  });
}

function header(run) {
  const spec = run.spec;
  const taken = run.managed.active_s;
  const ratio = run.total_steps ? run.step / run.total_steps : null;
  return [
    h("h1", { tabindex: "-1" }, run.run_id, " ", h("span", { class: `state ${run.state}` }, run.state)),
    h("p", null, sentence(run.summary), " ", h("span", { class: "quiet" }, sentence(run.next))),
    ratio !== null ? h("progress", { max: 1, value: ratio, "aria-label": `Step ${run.step} of ${run.total_steps}` }) : null,
    run.error ? h("div", { class: "card", role: "alert" }, h("strong", { class: "bad" }, shown(run.error.message)),
      run.error.remedy ? h("p", null, "What to do: ", prose(run.error.remedy)) : null,
      run.error.detail ? h("details", null, h("summary", null, "Traceback"), long(run.error.detail)) : null) : null,
    run.warnings.length ? h("details", { open: run.warnings.length < 4 }, h("summary", { class: "warn" }, `${run.warnings.length} warning${run.warnings.length > 1 ? "s" : ""}`),
      h("ul", null, run.warnings.map((text) => h("li", null, shown(text))))) : null,
    h("div", { class: "columns" },
      h("dl", { class: "facts" }, fact("Model", spec.model), fact("Environment", environmentLink(environmentOf(spec), null)), fact("Algorithm", `${spec.algorithm.toUpperCase()}${spec.thinking ? ", thinking" : ""}`),
        fact("Submitted", [moment(run.created_at), run.age ? ` (${run.age})` : ""]), run.finished_at ? fact("Ended", moment(run.finished_at)) : null),
      h("dl", { class: "facts" }, fact("Phase", run.phase ?? "–"), fact("Step", `${count(run.step)}${run.total_steps ? ` of ${count(run.total_steps)}` : ""}`),
        fact("Device", run.managed.device ?? "–"), fact("Time", [duration(taken), run.managed.estimated_s ? h("span", { class: "quiet" }, ` (estimated ${duration(run.managed.estimated_s)})`) : null]),
        fact("Cost", [usd(run.cost_usd), run.estimated_cost_usd !== null ? h("span", { class: "quiet" }, ` (estimated ${usd(run.estimated_cost_usd)})`) : null]),
        run.metrics.eval ? fact("Held-out reward", [`base ${number(run.metrics.eval.base)} → adapter `, h("strong", null, number(run.metrics.eval.adapter)), ` on ${count(run.metrics.eval.n)} rows`]) : null)),
  ];
}

function environmentOf(spec) {
  return String(spec.environment.id).split("@")[0];
}

function sentence(text) {
  return text ? prose(`${text[0].toUpperCase()}${text.slice(1)}.`.replace(/\.\.$/, ".")) : "";
}

function buttons(run) {
  const problem = h("span", { role: "alert", class: "bad" });
  const act = (label, question, path, after) => h("button", {
    onclick: async (event) => {
      if (question && !confirm(question)) return;
      event.target.disabled = true;
      try {
        const answer = await post(path, { secrets: {} }, { headers: { "Idempotency-Key": crypto.randomUUID() } });
        after(answer);
      } catch (error) {
        fill(problem, error.message, error.remedy ? ` (${error.remedy})` : "");
        event.target.disabled = false;
      }
    },
  }, label);
  const path = `/api/runs/${encodeURIComponent(run.run_id)}`;
  return [
    ENDED.has(run.state) ? null : act("Cancel", "Cancel this run? Its checkpoints stay.", `${path}/cancel`, () => announce("The run is being cancelled.")),
    run.state === "failed" || run.state === "cancelled" ? act("Retry", null, `${path}/retry`, (fresh) => go(runPath(fresh.run_id))) : null,
    link("/start", { from: run.run_id }, "Start one like it"),
    link("/compare", { runs: run.run_id }, "Compare"),
    run.checkpoints.length ? link("/playground", { model: run.run_id }, "Playground") : null,
    problem,
  ];
}
