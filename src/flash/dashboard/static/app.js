// The frame around every page: who may see it, navigation, theme, what to say when something fails.
// Pages are modules of their own, loaded when their address is asked for.

import * as api from "./api.js";
import { announce, fill, h, code } from "./dom.js";
import { address, follow, link } from "./router.js";
import { prose, zone } from "./text.js";

const PAGES = {
  "": ["Runs", () => import("./pages/runs.js")],
  runs: ["Run", () => import("./pages/run.js")],
  compare: ["Compare", () => import("./pages/compare.js")],
  environments: ["Environments", () => import("./pages/environments.js")],
  environment: ["Environment", () => import("./pages/environment.js")],
  models: ["Models", () => import("./pages/models.js")],
  playground: ["Playground", () => import("./pages/playground.js")],
  start: ["Start a run", () => import("./pages/start.js")],
  account: ["Account", () => import("./pages/account.js")],
};
const NAVIGATION = [["", "Runs"], ["environments", "Environments"], ["models", "Models"], ["playground", "Playground"], ["start", "Start a run"], ["account", "Account"]];
const BELONGS = { runs: "", compare: "", environment: "environments" };

let leaving = new AbortController();
let refused = null; // why the link that led here let no one in

async function show(parts, query) {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  trouble(refused);
  refused = null;
  const main = document.getElementById("main");
  const key = parts[0] === "runs" && parts.length < 2 ? "" : parts[0] ?? "";
  navigation(BELONGS[key] ?? key);
  if (!api.hasKey()) return signIn(main);
  const page = PAGES[key];
  if (!page) return notFound(main);
  const first = main.dataset.shown === undefined;
  main.dataset.shown = key;
  try {
    title(page[0]);
    const module = await page[1]();
    if (signal.aborted) return;
    fill(main);
    await module.show({
      main, signal, query, parts: parts.slice(1), trouble, title,
      poll: (ask) => api.poll(ask, { signal, trouble }),
    });
  } catch (error) {
    if (!signal.aborted && error.name !== "AbortError") failed(main, error);
  }
  if (!first && !signal.aborted) main.querySelector("h1")?.focus();
}

function title(text) {
  document.title = `${text} · Flash`;
  announce(text);
}

function navigation(current) {
  fill(document.getElementById("top"),
    h("a", { class: "brand", href: address("") }, h("span", { "aria-hidden": "true" }, "⚡"), " Flash"),
    h("nav", { "aria-label": "Pages" }, NAVIGATION.map(([path, label]) => {
      const node = link(path ? `/${path}` : "", {}, label);
      if (path === current) node.setAttribute("aria-current", "page");
      return node;
    })),
    themeButton());
}

// --- theme ----------------------------------------------------------------------------------------------------

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

function themeButton() {
  const now = localStorage.getItem("flash.theme") ?? "auto";
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(now) + 1) % names.length];
  return h("button", {
    class: "plain theme",
    title: `Colours: ${THEMES[now]}. Change to ${THEMES[next]}.`,
    "aria-label": `Colours: ${THEMES[now]}. Change to ${THEMES[next]}.`,
    onclick: (event) => {
      localStorage.setItem("flash.theme", next);
      applyTheme();
      event.target.replaceWith(themeButton());
      document.querySelector("button.theme").focus();
    },
  }, { auto: "◐", light: "☀", dark: "☾" }[now]);
}

function applyTheme() {
  const theme = localStorage.getItem("flash.theme") ?? "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

// --- when something is wrong ------------------------------------------------------------------------------------

function trouble(error) {
  const place = document.getElementById("trouble");
  if (!error) return fill(place);
  if (error.status === 401) {
    api.forgetKey();
    return signIn(document.getElementById("main"));
  }
  fill(place, h("p", null, h("strong", null, capital(error.message)), error.remedy ? [": ", prose(error.remedy)] : null,
    error.status === 0 || error.status >= 429 ? " – trying again" : null));
}

function failed(main, error) {
  if (error.status === 401) {
    api.forgetKey();
    return signIn(main);
  }
  const known = error instanceof api.ApiError;
  if (!known) console.error(error);
  fill(main, h("h1", { tabindex: "-1" }, error.status === 404 ? "Not found" : "That did not work"),
    h("p", null, known ? capital(error.message) : "This page has a defect."),
    h("p", null, known && error.remedy ? prose(error.remedy) : ["Go back to ", link("", {}, "all runs"), ", or ",
      h("button", { class: "plain", onclick: () => location.reload() }, "load the page again"), "."]));
}

function notFound(main) {
  title("Not found");
  fill(main, h("h1", { tabindex: "-1" }, "Not found"), h("p", null, "No page has this address. Go to ", link("", {}, "all runs"), "."));
}

function capital(text) {
  return text ? text[0].toUpperCase() + text.slice(1) : text;
}

function signIn(main) {
  title("Sign in");
  const key = h("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false", required: true });
  const problem = h("p", { role: "alert", class: "bad" });
  const form = h("form", {
    onsubmit: async (event) => {
      event.preventDefault();
      api.useKey(key.value.trim());
      try {
        await api.get("/api/whoami");
        window.dispatchEvent(new Event("flash:address"));
      } catch (error) {
        api.forgetKey();
        fill(problem, error.status === 401 ? "This key is not valid here." : capital(error.message));
      }
    },
  }, h("label", { for: "key" }, "Or enter an API key"), key, h("button", null, "Sign in"), problem);
  fill(main, h("h1", { tabindex: "-1" }, "Open the dashboard from a terminal"),
    h("p", null, "This browser has no key for this server yet. Run ", code("flash dashboard"), ": it opens this page with yours."),
    form);
}

// --- start ------------------------------------------------------------------------------------------------------

async function enter() {
  const found = /^#code=([\w-]+)$/.exec(location.hash);
  if (!found) return;
  history.replaceState(null, "", location.pathname + location.search); // the code is in no history
  try {
    if (api.hasKey() && (await api.get("/api/whoami").then(() => true, () => false))) return; // it lapses unused
    await api.redeem(found[1]);
  } catch (error) {
    refused = Object.assign(error, { status: error.status === 401 ? 403 : error.status });
  }
}

applyTheme();
document.documentElement.dataset.zone = zone();
await enter();
follow(show);
