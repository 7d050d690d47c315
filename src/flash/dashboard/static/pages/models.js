// What is deployed, and the bases that runs begin from.

import { get, remove } from "../api.js";
import { code, empty, fill, h, keep, table } from "../dom.js";
import { link, runPath } from "../router.js";
import { ago, count } from "../text.js";

export async function show({ main, signal, poll }) {
  const live = h("div");
  const bases = h("div");
  fill(main, h("h1", { tabindex: "-1" }, "Models"), h("h2", null, "Deployed"), live, h("h2", null, "Bases"), bases);
  const { models } = await get("/api/models", {}, signal);
  fill(bases, table("Base models", ["Model", "#Parameters", "Thinking", "#Context", "#Largest rank", "Licence", ""], models.map((model) => h("tr", null,
    h("th", { scope: "row" }, model.id, model.note ? h("div", { class: "quiet" }, model.note) : null), h("td", { class: "number" }, model.size), h("td", null, model.thinking ? "yes" : "no"), h("td", { class: "number" }, count(model.context)),
    h("td", { class: "number" }, count(model.rank_cap)), h("td", null, model.licence ?? "–"), h("td", null, link("/start", { model: model.id }, "Start a run"), " ", link("/playground", { model: model.id }, "Playground"))))));
  await poll(async () => {
    const { deployments } = await get("/api/deployments", {}, signal);
    keep(live, deployments.map((each) => ({ ...each, ago: ago(each.deployed_at) })), (list) => (list.length ? table("Deployed runs", ["Name", "#Step", "Base", "Engine", "Deployed", ""], list.map(row)) : empty("Nothing is deployed.", "Deploy a run's checkpoint from its page (", link("", {}, "all runs"), "), or from a terminal: ", code("flash deploy RUN_ID"), ".")));
    return 3;
  });
}

function row(deployment) {
  const { engine } = deployment;
  return h("tr", null, h("th", { scope: "row" }, link(runPath(deployment.run_id), {}, deployment.run_id)), h("td", { class: "number" }, count(deployment.step)), h("td", null, deployment.model),
    h("td", null, engine ? [`${engine.state}${engine.device ? ` on ${engine.device}` : ""}`, engine.reason ? h("div", { class: "quiet" }, engine.reason) : null] : h("span", { class: "quiet" }, "asleep: the next request starts one")),
    h("td", null, deployment.ago),
    h("td", null, link("/playground", { model: deployment.run_id }, "Playground"), " ", h("button", {
      onclick: async (event) => {
        if (!confirm(`Take ${deployment.run_id} down? Its adapters stay.`)) return;
        event.target.disabled = true;
        try {
          await remove(`/api/deployments/${encodeURIComponent(deployment.run_id)}`);
          event.target.closest("tr").remove();
        } catch (error) {
          event.target.after(h("span", { class: "bad", role: "alert" }, ` ${error.message}`));
          event.target.disabled = false;
        }
      },
    }, "Undeploy")));
}
