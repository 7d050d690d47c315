// A run's samples: what was asked, what the model wrote, what it got, by step and prompt. Prompts, answers and rewards
// are text from strangers: everything is shown as it is, nothing is obeyed.

import { get } from "../api.js";
import { empty, field, fill, h, keep, select } from "../dom.js";
import { note } from "../router.js";
import { count, long, number, plain, shown } from "../text.js";

const PAGE = 20;
const ORDERS = [["newest", "newest first"], ["oldest", "oldest first"], ["best", "best reward"], ["worst", "worst reward"], ["disagreeing", "most disagreement in the group"]];
const MARKS = [["", "all"], ["truncated", "truncated"], ["failed", "failed"]];
const KINDS = [["", "all"], ["rollout", "rollouts"], ["eval", "held-out, base against adapter"]];
const COLOURS = [["", "none"], ["logprob", "log-probability"], ["advantage", "advantage"]];

export async function open({ id, body, signal, query }) {
  const path = `/api/runs/${encodeURIComponent(id)}/samples`;
  const view = { order: query.get("order") ?? "newest", mark: query.get("mark") ?? "", kind: query.get("kind") ?? "", step: query.get("step") ?? "", row: query.get("row") ?? "", offset: Number(query.get("offset") ?? 0), colour: query.get("colour") ?? "" };
  let steps = [];
  let shownKey = "";
  const bar = h("div", { class: "bar" });
  const list = h("div");
  const pages = h("div", { class: "bar" });
  const status = h("p", { class: "quiet", role: "status" });
  fill(body, bar, status, list, pages);

  function change(part) {
    Object.assign(view, { offset: 0 }, part);
    note({ ...view, order: view.order === "newest" ? "" : view.order, offset: view.offset || "" });
    return load();
  }

  function controls() {
    keep(bar, [steps, view], () => [
      field("Order", select(ORDERS, view.order, (order) => change({ order }))),
      field("Step", select([["", "all"], ...steps.map(([step, many]) => [String(step), `${count(step)} (${many})`])].slice(0, 2000), view.step, (step) => change({ step }))),
      view.row === "" ? null : field("Prompt", h("button", { onclick: () => change({ row: "" }) }, `row ${view.row}: show all prompts`)),
      field("Mark", select(MARKS, view.mark, (mark) => change({ mark }))),
      field("Kind", select(KINDS, view.kind, (kind) => change({ kind }))),
      field("Colour tokens by", select(COLOURS, view.colour, (colour) => change({ colour, offset: view.offset }))),
    ]);
  }

  async function load() {
    const { order, mark, kind, step, row, offset } = view;
    const page = await get(path, { order, mark, kind, step, row, offset, limit: PAGE }, signal);
    steps = page.steps;
    controls();
    status.textContent = page.found ? `${count(offset + 1)}–${count(offset + page.samples.length)} of ${count(page.found)} samples` : "";
    const key = JSON.stringify([page.samples.map((each) => each.seq), view.colour]);
    if (key !== shownKey) {
      shownKey = key;
      if (page.samples.length) fill(list, grouped(page.samples).map((group) => section(group, view, change)));
      else fill(list, steps.length ? empty("No sample fits.", h("button", { class: "plain", onclick: () => change({ mark: "", kind: "", step: "", row: "", order: "newest" }) }, "Show all samples")) : empty("No samples yet.", "A GRPO run keeps some completions of its first step, every tenth and the last; every run with a held-out split keeps a few of its comparison."));
    }
    keep(pages, [offset, page.found], () => [
      h("button", { disabled: offset === 0, onclick: () => change({ offset: Math.max(0, offset - PAGE) }) }, "Previous"),
      h("button", { disabled: offset + PAGE >= page.found, onclick: () => change({ offset: offset + PAGE }) }, "Next")]);
  }

  return { async update() { if (view.offset === 0 || !shownKey) await load(); } };
}

/** Neighbours of one step and prompt together. */
function grouped(samples) {
  const groups = [];
  for (const sample of samples) {
    const last = groups.at(-1)?.[0];
    const same = last && sample.kind === "rollout" && last.kind === "rollout" && last.step === sample.step && last.data.row === sample.data.row;
    if (same) groups.at(-1).push(sample);
    else groups.push([sample]);
  }
  return groups;
}

function section(group, view, change) {
  const [first] = group;
  if (first.kind === "eval") return evaluation(first);
  const row = first.data.row;
  return h("article", { class: "sample", "aria-label": `Step ${first.step}, row ${row}` },
    h("header", null, h("strong", null, `Step ${count(first.step)}`),
      Number.isInteger(row) ? h("button", { class: "plain", onclick: () => change({ row: String(row) }) }, `row ${count(row)}`) : null,
      rewards(first.data, group.map((sample) => sample.data.sample ?? 0)), spread(first.data)),
    prompt(first.data).map(turn),
    group.map((sample) => [marks(sample), answer(sample.data, view.colour)]));
}

function marks(sample) {
  const { data } = sample;
  return h("p", { class: "turn" }, h("strong", null, `Reward ${typeof data.reward === "number" ? number(data.reward) : "–"} `),
    typeof data.advantage === "number" ? h("span", { class: "quiet" }, `advantage ${number(data.advantage)} `) : null,
    data.success === true ? h("span", { class: "tag good" }, "success") : null,
    sample.failed ? h("span", { class: "tag bad" }, "failed") : null,
    sample.truncated ? h("span", { class: "tag warn" }, "truncated") : null,
    data.error ? h("span", { class: "bad" }, shown(plain(data.error))) : null,
    h("span", { class: "quiet" }, [typeof data.tokens === "number" ? `${count(data.tokens)} tokens` : "", data.turns > 1 ? `, ${count(data.turns)} turns` : "", sample.epoch > 1 ? `, attempt ${sample.epoch}` : ""]));
}

/** All rewards of a group as small bars; those of the samples shown stand out. */
function rewards(data, kept) {
  const values = Array.isArray(data.rewards) ? data.rewards.filter((each) => typeof each === "number" && Number.isFinite(each)) : [];
  if (values.length < 2) return null;
  const low = Math.min(0, ...values);
  const high = Math.max(...values, low + 1e-9);
  return h("span", { class: "rewards", role: "img", "aria-label": `Rewards of the group: ${values.map(number).join(", ")}`, title: values.map(number).join(", ") },
    values.map((value, at) => {
      const bar = h("i", { class: kept.includes(at) ? "this" : "" });
      bar.style.height = `${(100 * (value - low)) / (high - low)}%`;
      return bar;
    }));
}

function spread(data) {
  const values = Array.isArray(data.rewards) ? data.rewards.filter((each) => typeof each === "number") : [];
  if (values.length < 2) return null;
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  return h("span", { class: "quiet" }, `mean ${number(mean)} of ${values.length}`);
}

function messagesOf(data) {
  return Array.isArray(data.messages) ? data.messages.filter((each) => each && typeof each === "object") : [];
}

function prompt(data) {
  const messages = messagesOf(data);
  const acts = messages.findIndex((message) => message.role === "assistant");
  return acts < 0 ? messages : messages.slice(0, acts);
}

function turn(message) {
  return h("div", { class: "turn" }, h("div", { class: "who" }, shown(plain(message.role))), long(plain(message.content)));
}

/** What came after the prompt: the model's turns and the environment's, told apart. */
function answer(data, colour) {
  const pieces = Array.isArray(data.pieces) ? data.pieces.filter((each) => Array.isArray(each) && typeof each[0] === "string") : null;
  if (pieces?.length) {
    return turns(pieces).map(([own, part]) => h("div", { class: `turn ${own ? "model" : "environment"}` }, h("div", { class: "who" }, own ? "model" : "environment"),
      own && colour ? tokens(part, colour, data.advantage) : folded(part.map((piece) => piece[0]).join(""))));
  }
  const messages = messagesOf(data);
  const acts = messages.findIndex((message) => message.role === "assistant");
  if (messages.filter((message) => message.role === "assistant").length > 1) {
    return messages.slice(acts).map((message) => h("div", { class: `turn ${message.role === "assistant" ? "model" : "environment"}` }, h("div", { class: "who" }, message.role === "assistant" ? "model" : ["environment (", shown(plain(message.role)), ")"]), folded(plain(message.content))));
  }
  return h("div", { class: "turn model" }, h("div", { class: "who" }, "model"), folded(plain(data.text)));
}

/** [whether the model wrote it, its pieces] for each run of pieces by one hand. A sampled piece has a log-probability. */
function turns(pieces) {
  const found = [];
  for (const piece of pieces) {
    const own = piece.length > 1;
    if (found.length && found.at(-1)[0] === own) found.at(-1)[1].push(piece);
    else found.push([own, [piece]]);
  }
  return found;
}

/** Text with its thinking folded away. */
function folded(text) {
  const end = text.lastIndexOf("</think>");
  if (end < 0) return text.trimStart().startsWith("<think>") ? [thinking(text), h("p", { class: "quiet" }, "(the thinking never ended)")] : long(text);
  const rest = text.slice(end + "</think>".length);
  return [thinking(text.slice(0, end)), long(rest)];
}

function thinking(text) {
  const inner = text.replace(/^\s*<think>/, "");
  return h("details", null, h("summary", { class: "quiet" }, `Thinking, ${count(inner.length)} characters`), long(inner));
}

/** Tokens shaded: unlikely ones darker, or all by the advantage that they were trained with. */
function tokens(pieces, colour, advantage) {
  const block = h("div", { class: "text" });
  for (const [text, logprob] of pieces.slice(0, 8000)) {
    const shade = colour === "logprob" ? unlikely(logprob) : favoured(advantage);
    const said = colour === "logprob" ? `log-probability ${number(logprob)} (${number(100 * Math.exp(logprob))} %)` : `advantage ${number(advantage)}`;
    block.append(h("span", { class: `token ${shade}`, title: said }, shown(text)));
  }
  return block;
}

function unlikely(logprob) {
  if (typeof logprob !== "number" || logprob > -0.1) return "";
  return logprob > -0.7 ? "p1" : logprob > -1.6 ? "p2" : logprob > -3 ? "p3" : "p4";
}

function favoured(advantage) {
  if (typeof advantage !== "number" || advantage === 0) return "";
  const size = Math.abs(advantage) < 0.15 ? 1 : Math.abs(advantage) < 0.5 ? 2 : 3;
  return `${advantage > 0 ? "up" : "down"}${size}`;
}

function evaluation(sample) {
  const { data } = sample;
  const side = (name, text, reward) => h("div", { class: `turn ${name === "base" ? "base" : "model"}` }, h("div", { class: "who" }, `${name}: reward ${typeof reward === "number" ? number(reward) : "–"}`), folded(plain(text)));
  return h("article", { class: "sample", "aria-label": `Held-out row, step ${sample.step}` },
    h("header", null, h("strong", null, "Held out"), h("span", { class: "quiet" }, `step ${count(sample.step)}, base against adapter`), sample.failed ? h("span", { class: "tag bad" }, "failed") : null),
    (Array.isArray(data.prompt) ? data.prompt.filter((each) => each && typeof each === "object").map(turn) : turn({ role: "prompt", content: data.prompt })),
    h("div", { class: "columns" }, side("base", data.base, data.base_reward), side("adapter", data.adapter, data.adapter_reward)));
}
