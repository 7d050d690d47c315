// Every environment that was pushed.

import { get } from "../api.js";
import { code, empty, fill, h, table } from "../dom.js";
import { environmentLink, link } from "../router.js";
import { ago, bytes, count } from "../text.js";

export async function show({ main, signal }) {
  const { environments } = await get("/api/environments", {}, signal);
  fill(main, h("h1", { tabindex: "-1" }, "Environments"),
    environments.length ? table("Environments", ["Environment", "Version", "#Files", "#Size", "Pushed", ""], environments.map((each) => {
      const id = `${each.namespace}/${each.name}`;
      return h("tr", null, h("th", { scope: "row" }, environmentLink(id, null)), h("td", { class: "mono" }, each.sha256.slice(0, 12)), h("td", { class: "number" }, count(each.files.length)),
        h("td", { class: "number" }, bytes(each.size)), h("td", null, ago(each.created_at)), h("td", null, link("/start", { environment: id }, "Start a run")));
    })) : empty("No environment yet.", "An environment says what a run learns from. Write one with ", code("flash env setup"), ", try it with ", code("flash env check"), ", and push it with ", code("flash env push --name NAME"), "."));
}
