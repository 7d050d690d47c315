// Who the reader is to this server, and leaving it.

import { forgetKey, get } from "../api.js";
import { code, fill, h } from "../dom.js";
import { zone } from "../text.js";
import { fact } from "./run.js";

export async function show({ main, signal }) {
  const [me, health, hardware] = await Promise.all([get("/api/whoami", {}, signal), get("/api/health", {}, signal), get("/api/hardware", {}, signal)]);
  fill(main, h("h1", { tabindex: "-1" }, "Account"),
    h("dl", { class: "facts" }, fact("Organisation", me.org), fact("Role", me.role), fact("Server", me.server), fact("Version", health.version), fact("Times are shown in", zone()),
      fact("Devices", hardware.devices.map((each) => `${each.device}: ${each.name}`).join(", ") || "none")),
    h("h2", null, "This browser"), h("p", null, "This browser keeps the key that ", code("flash dashboard"), " gave it, for this address alone."),
    h("button", { onclick: () => { forgetKey(); location.reload(); } }, "Forget the key"));
}
