// A chat with an adapter and its base side by side, over the same API that programs use (`/v1`), as it streams.

import { get, send } from "../api.js";
import { announce, empty, field, fill, h, keep, select } from "../dom.js";
import { link, note, runPath } from "../router.js";
import { count, long, number, shown } from "../text.js";
import { deployButton } from "./overview.js";

export async function show({ main, query, signal }) {
  const [{ data: served }, { models: bases }, { runs }] = await Promise.all([get("/v1/models", {}, signal), get("/api/models", {}, signal), get("/api/overview", { limit: 200 }, signal)]);
  const live = served.filter((each) => each.base);
  const wanted = query.get("model") ?? live[0]?.id ?? served[0]?.id ?? "";
  const turns = []; // {role, content}, shared by both sides up to the last question
  const sides = [];
  let stop = null;

  const names = [...new Set([wanted, ...live.map((each) => each.id), ...served.filter((each) => !each.base).map((each) => each.id)])].filter(Boolean);
  const model = select(names.map((name) => [name, live.some((each) => each.id === name) ? `${name} (adapter)` : name]), wanted, (name) => { note({ model: name }); begin(); });
  const system = h("textarea", { rows: 2, value: query.get("system") ?? "", placeholder: "none" });
  const most = h("input", { type: "number", min: 1, max: 100000, value: 512 });
  const heat = h("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0 });
  const think = h("input", { type: "checkbox" });
  const beside = h("input", { type: "checkbox", checked: true, onchange: begin });
  const question = h("textarea", { rows: 3, required: true, onkeydown: (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); } } });
  const sendButton = h("button", { class: "main" }, "Send");
  const stopButton = h("button", { type: "button", hidden: true, onclick: () => stop?.abort() }, "Stop");
  const place = h("div", { class: "columns", id: "answers" });
  const hint = h("div");
  fill(main, h("h1", { tabindex: "-1" }, "Playground"),
    h("div", { class: "bar" }, field("Model", model), field("Most tokens", most), field("Temperature", heat), h("label", null, think, " Thinking"), h("label", null, beside, " Base beside it")),
    field("System message", system), hint, place,
    h("form", { onsubmit: (event) => { event.preventDefault(); ask(); } }, field("Message", question, "Enter sends, Shift+Enter starts a new line."), h("div", { class: "bar" }, sendButton, stopButton, h("button", { type: "button", onclick: begin }, "New chat"))));

  function begin() {
    stop?.abort();
    turns.length = 0;
    const found = live.find((each) => each.id === model.value || model.value.startsWith(`${each.id}/`));
    const run = runs.find((each) => each.run_id === model.value.split("/")[0]);
    keep(hint, [model.value, Boolean(found), Boolean(run)], () => {
      if (!names.length) return empty("No model can be served here.", "See ", link("/models", {}, "the models"), ".");
      if (run && !found) return empty("This run is not deployed.", "Deploy its final adapter: ", deployButton(run.run_id, null), " or choose a step on ", link(runPath(run.run_id), {}, "its page"), ".");
      return null;
    });
    const base = found?.base ?? (run && bases.some((each) => each.id === run.model) ? run.model : null);
    sides.splice(0, sides.length, side(model.value, found ? `adapter, ${found.checkpoint}` : "base"));
    if (base && beside.checked && base !== model.value) sides.push(side(base, "base"));
    fill(place, sides.map((each) => each.node));
  }

  async function ask() {
    const text = question.value.trim();
    if (!text || stop) return;
    question.value = "";
    stop = new AbortController();
    signal.addEventListener("abort", () => stop?.abort());
    sendButton.disabled = true;
    stopButton.hidden = false;
    try {
      const settings = { max_tokens: Number(most.value), temperature: Number(heat.value), chat_template_kwargs: { enable_thinking: think.checked } };
      await Promise.all(sides.map((each) => each.ask(text, system.value.trim(), settings, stop.signal)));
      announce("Answered.");
    } finally {
      stop = null;
      sendButton.disabled = false;
      stopButton.hidden = true;
      question.focus();
    }
  }

  begin();
}

/** One column: a model's own conversation. */
function side(name, what) {
  const messages = [];
  const list = h("div", { role: "log", "aria-label": `Chat with ${name}` });
  const node = h("section", { class: "card", "aria-label": name }, h("h2", null, name, " ", h("span", { class: "tag" }, what)), list);
  return {
    node,
    async ask(text, system, settings, signal) {
      messages.push({ role: "user", content: text });
      list.append(h("div", { class: "turn" }, h("div", { class: "who" }, "you"), h("div", { class: "text" }, shown(text))));
      const reasoning = h("div", { class: "text" });
      const folded = h("details", { hidden: true }, h("summary", { class: "quiet" }, "Thinking"), reasoning);
      const answer = h("div", { class: "text" });
      const status = h("small", { class: "quiet", role: "status" }, "waiting for the engine …");
      list.append(h("div", { class: "turn model" }, h("div", { class: "who" }, name), folded, answer, status));
      const began = performance.now();
      let said = "";
      let thought = "";
      let first = null;
      let usage = null;
      let reason = null;
      try {
        const body = { model: name, messages: [...(system ? [{ role: "system", content: system }] : []), ...messages], stream: true, stream_options: { include_usage: true }, ...settings };
        const response = await send("POST", "/v1/chat/completions", { body, signal });
        const step = response.headers.get("X-Freesolo-Checkpoint");
        for await (const chunk of chunks(response)) {
          if (chunk.error) throw Object.assign(new Error(chunk.error.message), { remedy: null });
          if (chunk.usage) usage = chunk.usage;
          const choice = chunk.choices?.[0];
          reason = choice?.finish_reason ?? reason;
          thought += choice?.delta?.reasoning_content ?? "";
          said += choice?.delta?.content ?? "";
          if (first === null && (said || thought)) { first = performance.now() - began; status.textContent = "…"; }
          if (choice?.delta?.reasoning_content) { folded.hidden = false; fill(reasoning, shown(thought)); }
          if (choice?.delta?.content) fill(answer, shown(said));
        }
        fill(answer, long(said).childNodes.length ? [...long(said).childNodes] : h("span", { class: "quiet" }, "(empty)"));
        messages.push({ role: "assistant", content: said });
        const seconds = (performance.now() - began) / 1000;
        status.textContent = [usage ? `${count(usage.completion_tokens)} tokens` : null, first === null ? null : `first after ${number(first / 1000)} s`, `${number(seconds)} s`, reason === "length" ? "cut at the most tokens" : null, step ? step : null].filter(Boolean).join(", ");
      } catch (error) {
        messages.pop();
        fill(status, error.name === "AbortError" ? "stopped" : h("span", { class: "bad" }, `${error.message}${error.remedy ? ` (${error.remedy})` : ""}`));
      }
    },
  };
}

/** The JSON of each server-sent event. */
async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
