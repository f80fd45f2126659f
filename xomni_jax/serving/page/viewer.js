// The dialog of one image: its codes, how sure the model was of each, questions about it, and its file.

import { events, json } from "./api.js";
import { CodeGrid } from "./codes.js";

const $ = (id) => document.getElementById(id);
const grid = new CodeGrid($("codes"), $("code"));
let image, asking;

$("close").addEventListener("click", () => $("image").close());
$("image").addEventListener("close", () => asking?.abort());
$("shade").addEventListener("change", shade);

function shades() {
  const all = image.logp ? { "−log probability when drawn": async () => image.logp.map((row) => row.map((x) => -x)) } : {};
  if (image.prompt) all["entropy of the model"] = entropy;
  return { ...all, nothing: async () => null };
}

async function entropy() {
  image.entropy ??= (await json("/v1/xomni/entropy", { model: image.model, prompt: image.prompt, codes: image.codes })).entropy;
  return image.entropy;
}

async function shade() {
  const of = image, name = $("shade").value;
  try {
    const values = await shades()[name]();
    if (of === image) grid.show(image.codes, values, name.replace("−log probability when drawn", "nats").replace("entropy of the model", "entropy in nats"));
  } catch (error) {
    $("code").textContent = error.message;
  }
}

// {src, title, facts, model, codes, prompt?, logp?, again?, link?, name}
export function open(shown) {
  image = shown;
  $("about").textContent = shown.title;
  $("large").src = shown.src;
  $("large").alt = shown.title;
  $("facts").textContent = shown.facts;
  $("second").hidden = !shown.again;
  if (shown.again) $("again").src = shown.again;
  $("download").href = shown.src;
  $("download").download = shown.name;
  $("link").hidden = !shown.link;
  if (shown.link) $("link").href = shown.link;
  $("map").hidden = !shown.codes;
  $("answers").replaceChildren();
  $("shade").replaceChildren(...Object.keys(shades()).map((name) => new Option(name, name)));
  if (!$("image").open) $("image").showModal();
  if (shown.codes) shade();
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  asking?.abort();
  asking = new AbortController();
  const question = document.createElement("dt"), answer = document.createElement("dd");
  question.textContent = $("question").value;
  answer.textContent = "…";
  $("answers").prepend(question, answer);
  const content = [{ type: "image_url", image_url: { url: image.src } }, { type: "text", text: $("question").value }];
  let text = "";
  try {
    await events("/v1/chat/completions", { model: image.model, messages: [{ role: "user", content }] }, (data) => {
      text += data.choices[0]?.delta.content ?? "";
      answer.textContent = text;
    }, asking.signal);
  } catch (error) {
    if (error.name !== "AbortError") answer.textContent = error.message;
  }
});
