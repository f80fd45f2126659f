// The page of xomni serve: a form, what it has drawn, and what was drawn before.

import { events, json, Refused } from "./api.js";
import { open } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["prompt", "size", "n", "seed", "reward", "temperature", "top_k", "top_p", "min_p", "guidance"];
const TEXT = new Set(["prompt", "size", "reward"]);
const PAST = "xomni history", KEPT = 50;
let models = [], running;

// ---- the form ----
function chosenModels() {
  return [...$("models").querySelectorAll("input:checked")].map((box) => box.value);
}

function settings() {
  const found = { models: chosenModels() };
  for (const name of FIELDS) {
    const value = $(name).value.trim();
    if (value) found[name] = TEXT.has(name) ? value : Number(value);
  }
  return found;
}

function fill(found) {
  for (const name of FIELDS) if (found[name] !== undefined || name !== "n") $(name).value = found[name] ?? "";
  if (!$("size").value) $("size").selectedIndex = 0;
  for (const box of $("models").querySelectorAll("input")) box.checked = found.models ? found.models.includes(box.value) : true;
}

function linkOf(found) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(found)) query.set(name, Array.isArray(value) ? value.join("|") : value);
  return `#${query}`;
}

function ofLink(hash) {
  const found = Object.fromEntries(new URLSearchParams(hash.slice(1)));
  if (found.models) found.models = found.models.split("|");
  return found;
}

function say(message) {
  $("message").textContent = message;
}

function explain(error) {
  if (error.name === "AbortError") return;
  say(error.message);
  $("locked").hidden = !(error instanceof Refused && error.status === 401);
}

// ---- drawing ----
function element(name, parent, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}

// A row per seed, a column per model: {cell(model, index)}.
function table(found) {
  const card = document.createElement("section");
  card.className = "drawing";
  const heading = element("h2", card);
  element("a", heading, found.prompt).href = linkOf(found);
  element("p", card, `seed ${found.seed}, ${found.size}`, "soft");
  const body = element("table", element("div", card, undefined, "scroll"));
  const head = element("tr", element("thead", body));
  for (const model of found.models) element("th", head, model).scope = "col";
  const rows = element("tbody", body), cells = new Map();
  for (let index = 0; index < found.n; index++) {
    const row = element("tr", rows);
    for (const model of found.models) {
      const place = element("td", row), button = element("button", place, undefined, "cell");
      button.type = "button";
      button.disabled = true;
      const image = element("img", button);
      const [width, height] = found.size.split("x").map(Number);
      image.width = width;
      image.height = height;
      image.alt = `image ${index + 1} of ${model}, waiting`;
      cells.set(`${model} ${index}`, { place, button, image, caption: element("div", place, "waiting", "soft") });
    }
  }
  $("results").prepend(card);
  return (model, index) => cells.get(`${model} ${index}`);
}

function shown(found, model, cell, data) {
  const src = `data:image/png;base64,${data.b64_json}`;
  cell.image.src = src;
  if (data.type.endsWith("partial_image")) {
    cell.caption.textContent = "drawing …";
    return;
  }
  cell.image.alt = `${found.prompt}, image ${data.index + 1} of ${model}`;
  const reward = data.reward;
  const judged = reward ? `${reward.name} ${reward.value === null ? `not known: ${reward.error ?? "does not apply"}` : reward.value.toFixed(3)}` : "";
  cell.caption.textContent = judged || `number ${data.index}`;
  cell.button.disabled = false;
  cell.button.onclick = () => open({
    src, model, codes: data.codes, logp: data.logp, prompt: found.prompt, title: found.prompt, link: linkOf(found),
    facts: [`${model}, seed ${data.seed}, number ${data.index}, ${data.size}`, judged].filter(Boolean).join(", "),
    name: `${data.seed}_${data.index}.png`,
  });
}

async function draw(found) {
  running?.abort();
  running = new AbortController();
  const { signal } = running, cellOf = table(found);
  $("stop").disabled = false;
  const { models: names, reward, ...body } = found;
  const judged = reward ? { reward, best_of: found.n } : {};
  const request = { ...body, ...judged, partial_images: 4, return_codes: true };
  const ends = await Promise.allSettled(names.map((model) => {
    let first = true;
    return events("/v1/images/generations", { ...request, model }, (data) => {
      const cell = cellOf(model, data.index);
      shown(found, model, cell, data);
      if (reward && first && data.type.endsWith("completed")) {
        first = false;
        cell.place.className = "best";
      }
    }, signal);
  }));
  if (signal === running?.signal) $("stop").disabled = true;
  for (const [i, end] of ends.entries()) {
    if (end.status === "fulfilled") continue;
    explain(end.reason);
    for (let index = 0; index < found.n; index++) {
      const cell = cellOf(names[i], index);
      if (cell.button.disabled) cell.caption.textContent = end.reason.name === "AbortError" ? "stopped" : "not drawn";
    }
  }
}

function start(found) {
  say("");
  if (!found.models.length) return say("choose a model");
  found.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  found.n ??= 1;
  remember(found);
  history.replaceState(null, "", linkOf(found));
  return draw(found);
}

$("draw").addEventListener("submit", (event) => {
  event.preventDefault();
  start(settings());
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("draw").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("locked").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  connect();
});

// ---- an image of the user's ----
$("upload").addEventListener("change", async () => {
  const [file] = $("upload").files;
  $("upload").value = "";
  if (!file) return;
  say("");
  const src = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(file);
  });
  try {
    const [model] = chosenModels();
    // The decoder reads the prompt, too: without it colours are its guess.
    const prompt = $("prompt").value.trim();
    const told = await json("/v1/xomni/encode", { image: src, model, reconstruct: true, prompt });
    const facts = `${told.codes.length} x ${told.codes[0].length} codes of ${told.model}`;
    $("of").textContent = prompt ? "reconstructed from its codes and the prompt" : "reconstructed from its codes alone; a prompt in the form helps";
    open({ src, model: told.model, codes: told.codes, again: `data:image/png;base64,${told.b64_json}`, title: file.name, facts, name: file.name });
  } catch (error) {
    explain(error);
  }
});

// ---- what was drawn before ----
function past() {
  try {
    return JSON.parse(localStorage.getItem(PAST)) ?? [];
  } catch {
    return [];
  }
}

function remember(found) {
  const link = linkOf(found);
  localStorage.setItem(PAST, JSON.stringify([found, ...past().filter((old) => linkOf(old) !== link)].slice(0, KEPT)));
  showPast();
}

function showPast() {
  $("history").replaceChildren(...past().map((old) => {
    const line = document.createElement("li");
    element("a", line, `${old.prompt} (seed ${old.seed})`).href = linkOf(old);
    return line;
  }));
  $("forget").hidden = !past().length;
}

$("forget").addEventListener("click", () => {
  localStorage.removeItem(PAST);
  showPast();
});
window.addEventListener("hashchange", () => reproduce());

function reproduce() {
  const found = ofLink(location.hash);
  if (!found.prompt) return;
  $("image").close();
  fill(found);
  start(settings());
}

// ---- the service ----
async function connect() {
  try {
    models = (await json("/v1/models")).data;
  } catch (error) {
    $("status").textContent = "not connected";
    return explain(error);
  }
  $("locked").hidden = true;
  say("");
  $("status").textContent = models.map((model) => `${model.id} ${model.xomni.hash ?? "(loading)"}`).join(" · ");
  const about = models[0].xomni;
  $("size").replaceChildren(...about.sizes.map((size) => new Option(size, size, size === about.size, size === about.size)));
  $("n").max = about.max_images;
  for (const [name, value] of Object.entries(about.sampling)) $(name).placeholder = value;
  const boxes = models.map((model) => {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.name = "models";
    box.value = model.id;
    box.checked = true;
    label.append(box, model.id);
    return label;
  });
  $("models").replaceChildren($("models").querySelector("legend"), ...boxes);
  $("reward").replaceChildren(new Option("nobody", ""), ...about.rewards.map((name) => new Option(name, name)));
  $("best").hidden = !about.rewards.length;
  showPast();
  reproduce();
}

connect();
