// One environment: its versions, files, rows with what is wrong with them, runs, and differences between versions.

import { get } from "../api.js";
import { code, empty, field, fill, h, select, table } from "../dom.js";
import { go, link, runPath } from "../router.js";
import { ago, bytes, count, long, plain, shown } from "../text.js";

const VIEWS = [["files", "Files"], ["rows", "Rows"], ["runs", "Runs"], ["diff", "Differences"]];
const PAGE = 25;

export async function show({ main, query, signal, title }) {
  const id = query.get("id") ?? "";
  const view = query.get("view") ?? "files";
  title(`${id} · environment`);
  const { versions, runs } = await get("/api/packages/versions", { environment: id }, signal);
  const wanted = query.get("version");
  const current = versions.find((each) => wanted && each.sha256.startsWith(wanted)) ?? versions[0];
  const at = (part) => ({ id, view, version: wanted, ...part });
  const body = h("div");
  const choice = select(versions.map((each, place) => [each.sha256.slice(0, 12), `${each.sha256.slice(0, 12)} · ${ago(each.created_at)}${place === 0 ? " · current" : ""}${each.offered ? "" : " · no longer offered"} · ${each.runs} run${each.runs === 1 ? "" : "s"}`]), current.sha256.slice(0, 12), (version) => go("/environment", at({ version })));
  fill(main, h("h1", { tabindex: "-1" }, id), h("div", { class: "bar" }, field("Version", choice), link("/start", { environment: id }, "Start a run")),
    h("nav", { class: "tabs", "aria-label": "Parts of the environment" }, VIEWS.map(([name, label]) => {
      const node = link("/environment", at({ view: name, path: null, split: null, offset: null }), label);
      if (name === view) node.setAttribute("aria-current", "page");
      return node;
    })), body);
  const asked = { environment: id, version: current.sha256 };
  if (view === "runs") return fill(body, runsTable(runs));
  if (view === "diff") return diff(body, id, versions, query, signal, at);
  if (view === "rows") return rows(body, asked, query, signal, at);
  return files(body, asked, query, signal, at);
}

async function files(body, asked, query, signal, at) {
  const listed = await get("/api/packages/files", asked, signal);
  const path = query.get("path") ?? listed.files.find((file) => file.path === "environment.py")?.path ?? listed.files[0]?.path;
  const list = h("nav", { "aria-label": "Files" }, h("ul", null, listed.files.map((file) => {
    const node = link("/environment", at({ view: "files", path: file.path }), shown(file.path));
    if (file.path === path) node.setAttribute("aria-current", "true");
    return h("li", null, node, h("span", { class: "quiet" }, ` ${bytes(file.size)}`));
  })));
  if (!path) return fill(body, empty("This version has no files."));
  const file = await get("/api/packages/file", { ...asked, path }, signal);
  fill(body, list, h("h2", null, shown(path)),
    file.text === null ? empty("This is not text.", "Pull the environment to look at it: ", code(`flash env pull ${asked.environment}`)) : [
      file.truncated ? h("p", { class: "warn" }, `Only the first part of ${bytes(file.size)} is shown.`) : null,
      h("div", { class: "card" }, h("pre", { tabindex: "0", "aria-label": path }, shown(file.text)))]);
}

async function rows(body, asked, query, signal, at) {
  const listed = await get("/api/packages/files", asked, signal);
  if (!listed.splits.length) return fill(body, empty("This version packages no rows.", "Its environment.py makes them in code; ", code("flash env check"), " shows them."));
  const split = query.get("split") ?? listed.splits[0];
  const offset = Number(query.get("offset") ?? 0);
  const page = await get("/api/packages/rows", { ...asked, split, offset, limit: PAGE }, signal);
  const dropped = Object.entries(page.dropped);
  fill(body,
    h("p", null, "Split: ", listed.splits.map((each) => {
      const node = link("/environment", at({ view: "rows", split: each, offset: null }), each);
      if (each === split) node.setAttribute("aria-current", "true");
      return [node, " "];
    }), h("span", { class: "quiet" }, `${count(page.count)} rows`)),
    page.problems.length ? h("details", { open: true }, h("summary", { class: "warn" }, `${page.problems.length}${page.problems.length >= 50 ? " or more" : ""} problems`), h("ul", null, page.problems.map((text) => h("li", null, shown(text))))) : h("p", { class: "good" }, "No problems found."),
    dropped.length ? h("p", { class: "warn" }, "No run sees these keys: ", dropped.map(([key, many]) => [h("code", null, shown(key)), ` (${count(many)} rows) `])) : null,
    table(`Rows of ${split}`, ["Row", "Input", "Output", "Metadata"], page.rows.map((row) => h("tr", null,
      h("th", { scope: "row" }, row.place.split(" ").slice(1).join(" "), row.problem ? h("div", { class: "warn" }, "problem") : null),
      ["input", "output", "metadata"].map((key) => h("td", null, row.row ? long(plain(row.row[key])) : key === "input" ? h("span", { class: "bad" }, shown(row.problem)) : ""))))),
    h("div", { class: "bar" }, offset > 0 ? link("/environment", at({ view: "rows", split, offset: Math.max(0, offset - PAGE) || null }), "Previous rows") : null,
      offset + PAGE < page.count ? link("/environment", at({ view: "rows", split, offset: offset + PAGE }), "Next rows") : null));
}

function runsTable(runs) {
  if (!runs.length) return empty("No run uses this environment yet.");
  return table("Runs on this environment", ["Run", "State", "Model", "Algorithm", "#Step", "Submitted"], runs.map((run) => h("tr", null, h("th", { scope: "row" }, link(runPath(run.run_id), {}, run.run_id)),
    h("td", null, h("span", { class: `state ${run.state}` }, run.state)), h("td", null, run.model), h("td", null, run.algorithm), h("td", { class: "number" }, count(run.step)), h("td", null, ago(run.created_at)))));
}

async function diff(body, id, versions, query, signal, at) {
  if (versions.length < 2) return fill(body, empty("There is one version only.", "Push again after a change, and the two can be compared."));
  const short = (version) => version.sha256.slice(0, 12);
  const before = query.get("before") ?? short(versions[1]);
  const after = query.get("after") ?? short(versions[0]);
  const options = versions.map((each) => [short(each), `${short(each)} · ${ago(each.created_at)}`]);
  const open = (part) => go("/environment", at({ view: "diff", before, after, ...part }));
  const found = await get("/api/packages/diff", { before: `${id}@${before}`, after: `${id}@${after}` }, signal);
  fill(body, h("div", { class: "bar" }, field("From", select(options, before, (value) => open({ before: value }))), field("To", select(options, after, (value) => open({ after: value })))), differences(found));
}

/** What changed between two versions, file by file. */
export function differences(found) {
  if (!found.files.length) return h("p", null, "Nothing differs.");
  return [found.files.map((file) => h("section", null, h("h3", null, shown(file.path), h("span", { class: "quiet" }, ` ${file.change}`)),
    file.lines.length ? h("div", { class: "diff", tabindex: "0", role: "region", "aria-label": `Differences in ${file.path}` }, file.lines.slice(2).map((line) => h("div", { class: line[0] === "+" ? "plus" : line[0] === "-" ? "minus" : line[0] === "@" ? "place" : "" }, shown(line)))) : h("p", { class: "quiet" }, "Not text."),
    file.truncated ? h("p", { class: "warn" }, "Only the first part is shown.") : null)), h("p", { class: "quiet" }, `${count(found.same)} files are the same.`)];
}
