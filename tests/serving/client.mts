// What a TypeScript program does with OpenAI's own client; prints what it saw as JSON.
import OpenAI from "openai";

const [baseURL, apiKey, model, headers] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, defaultHeaders: JSON.parse(headers), maxRetries: 0 });
const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: "What is 12 + 30?" }];
const common = { model, messages, temperature: 0, max_tokens: 24 };

const whole = await client.chat.completions.create({ ...common, logprobs: true, top_logprobs: 2 });

let streamed = "";
let usage: OpenAI.CompletionUsage | null | undefined;
const stream = await client.chat.completions.create({
  ...common,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}

// the client's own accumulator is strict about what chunks look like
const accumulated = await client.chat.completions.stream({ ...common }).finalChatCompletion();

const structured = await client.chat.completions.create({
  ...common,
  response_format: {
    type: "json_schema",
    json_schema: {
      name: "sum",
      strict: true,
      schema: {
        type: "object",
        properties: { sum: { type: "integer", minimum: 0, maximum: 99 } },
        required: ["sum"],
        additionalProperties: false,
      },
    },
  },
});

const completion = await client.completions.create({ model, prompt: [5, 6, 7], echo: true, logprobs: 1, max_tokens: 1 });

let refused: { status?: number; code?: string | null; param?: string | null } = {};
try {
  await client.chat.completions.create({ ...common, max_tokens: 1_000_000 });
} catch (error) {
  if (error instanceof OpenAI.BadRequestError) {
    refused = { status: error.status, code: error.code, param: error.param };
  }
}

const controller = new AbortController();
const aborted = await client.chat.completions.create({ ...common, stream: true }, { signal: controller.signal });
for await (const _ of aborted) {
  controller.abort();
}

console.log(
  JSON.stringify({
    text: whole.choices[0].message.content,
    finish: whole.choices[0].finish_reason,
    scored: whole.choices[0].logprobs?.content?.length,
    tokens: whole.usage?.completion_tokens,
    streamed,
    usage,
    accumulated: accumulated.choices[0].message.content,
    structured: JSON.parse(structured.choices[0].message.content ?? "null"),
    echoed: completion.choices[0].logprobs?.token_logprobs?.length,
    refused,
  }),
);
