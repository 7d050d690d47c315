// Who the reader is to this server, and leaving it; for admins the org's keys with their roles and caps, and who did
// what. A new key is shown once, here, and nowhere again.

import { forgetKey, get, post, remove } from "../api.js";
import { announce, code, empty, fact, field, fill, h, select, table } from "../dom.js";
import { ago, clock, count, moment, shown, usd, zone } from "../text.js";

const ROLES = [["read-only", "read-only: look"], ["member", "member: look and run"], ["admin", "admin: and see to keys"]];
const ADMINS = new Set(["admin", "owner"]);

export async function show({ main, signal }) {
  const [me, health, hardware] = await Promise.all([get("/api/whoami", {}, signal), get("/api/health", {}, signal), get("/api/hardware", {}, signal)]);
  const keys = h("section");
  fill(main, h("h1", { tabindex: "-1" }, "Account"),
    h("dl", { class: "facts" }, fact("Organisation", me.org), fact("Role", me.role), fact("Server", me.server), fact("Version", health.version), fact("Times are shown in", zone()),
      fact("Devices", hardware.devices.map((each) => `${each.device}: ${each.name}`).join(", ") || "none")),
    h("h2", null, "This browser"), h("p", null, "This browser keeps the key that ", code("flash dashboard"), " gave it, for this address alone."),
    h("button", { onclick: () => { forgetKey(); location.reload(); } }, "Forget the key"), keys);
  if (ADMINS.has(me.role)) await administration(keys, signal);
}

async function administration(node, signal) {
  const list = h("div");
  const audit = h("div");
  const fresh = h("div", { role: "status" });
  const name = h("input", { required: true, maxlength: 200, autocomplete: "off" });
  const role = select(ROLES, "member");
  const caps = Object.fromEntries([["max_usd", 0.01], ["max_runs", 1], ["max_gpus", 1]].map(([key, step]) => [key, h("input", { type: "number", min: 0, step, placeholder: "no cap" })]));
  const form = h("form", {
    onsubmit: async (event) => {
      event.preventDefault();
      const limits = Object.fromEntries(Object.entries(caps).map(([key, input]) => [key, input.value === "" ? null : Number(input.value)]));
      try {
        const made = await post("/api/keys", { name: name.value.trim(), role: role.value, ...limits });
        fill(fresh, h("div", { class: "card" }, h("p", null, `The key of ${made.key.name}, shown this once:`), h("pre", { tabindex: "0", "aria-label": "The new key" }, made.secret)));
        announce("The key was made.");
        form.reset();
        await draw();
      } catch (error) {
        fill(fresh, h("p", { class: "bad" }, shown(error.message), error.remedy ? ` (${error.remedy})` : ""));
      }
    },
  }, h("div", { class: "bar" }, field("Name", name, "of a person or a program"), field("Role", role), field("Most dollars, of all its runs", caps.max_usd), field("Most unfinished runs", caps.max_runs), field("Most GPUs at once", caps.max_gpus), h("button", null, "Make a key")));
  fill(node, h("h2", null, "Keys"), list, h("h3", null, "A new key"), form, fresh, h("h2", null, "Who did what"), audit);

  async function draw() {
    const [{ keys }, { entries }] = await Promise.all([get("/api/keys", {}, signal), get("/api/audit", { limit: 50 }, signal)]);
    fill(list, keys.length ? table("Keys", ["Name", "Organisation", "Role", "#Dollars", "#Runs", "#GPUs", "Made", ""], keys.map((key) => h("tr", null,
      h("th", { scope: "row" }, shown(key.name), h("div", { class: "quiet mono" }, key.id)), h("td", null, key.org), h("td", null, key.role),
      h("td", { class: "number" }, key.max_usd === null ? "–" : usd(key.max_usd)), h("td", { class: "number" }, count(key.max_runs)), h("td", { class: "number" }, count(key.max_gpus)), h("td", null, ago(key.created_at)),
      h("td", null, key.revoked_at ? h("span", { class: "quiet" }, "revoked ", moment(key.revoked_at)) : revoke(key, draw))))) : empty("No key yet."));
    fill(audit, entries.length ? table("Audit log", ["When", "Who", "What", "On", "Answer"], entries.map((each) => h("tr", null, h("td", null, clock(each.time)), h("td", null, shown(each.name ?? each.actor)), h("td", { class: "mono" }, shown(each.action)),
      h("td", { class: "mono" }, shown(each.object ?? "")), h("td", { class: each.status >= 400 ? "bad" : "" }, each.status, each.message ? [" ", shown(each.message)] : null)))) : empty("Nothing was done yet."));
  }

  await draw();
}

function revoke(key, after) {
  const button = h("button", {
    "aria-label": `Revoke ${key.name}`,
    onclick: async () => {
      if (!confirm(`Revoke the key of ${key.name}? It is refused from the next request on.`)) return;
      try {
        await remove(`/api/keys/${encodeURIComponent(key.id)}`);
        await after();
      } catch (error) {
        button.after(h("span", { class: "bad", role: "alert" }, ` ${error.message}`));
      }
    },
  }, "Revoke");
  return button;
}
