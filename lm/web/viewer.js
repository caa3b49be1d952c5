// The page of `lm rollouts`. Filters and the chosen group are in the URL; texts of models and data are only ever set as text.
"use strict";

const find = (id) => document.getElementById(id);
const form = find("controls");
const FIELDS = ["stage", "steps", "search", "sort", "filter", "task", "page"]; // what the list depends on
const FILTERS = {
  no_signal: "no signal", truncated: "truncated", disagreement: "rewards disagree", tool_error: "tool errors",
  timeout: "timed out", not_trained: "not trained on",
};
const TOLD = {
  no_signal: "groups whose completions all have the same advantage",
  truncated: "completions cut off at max_new_tokens",
  disagreement: "completions that one reward puts above the group's mean and another below",
  tool_error: "dialogues in which the environment reported an error",
  timeout: "the environment took too long",
  not_trained: "sampled, but in no update",
};
// label; a token's number; what it is divided by for full colour (0: the largest of the completion); what the colours say
const COLOURS = {
  logp: ["log-probability", (t, i) => at(t.logp, i), 6, "orange: improbable (−6 nats: full colour)"],
  advantage: ["advantage", (t, i) => at(t.advantage, i), 0, "orange: above 0, blue: below"],
  ratio: ["ratio", (t, i) => log(at(t.ratio, i)), 0, "π trainer / π sampler at the step's first update; orange: above 1, blue: below"],
  clip: ["clip", (t, i) => at(t.clip, i), 1, "orange: ratio above its bound, blue: below, so that the token has no gradient"],
  kl: ["KL to the reference", (t, i) => at(t.kl, i), 0, "estimate k3 of each token; orange: largest"],
  gap: ["Δ log p", (t, i) => at(t.gap, i), 0, "trainer less sampler; orange: the trainer's is higher, blue: lower"],
  author: ["author", (t, i) => [null, 1, -1][t.authors[i]], 2, "orange: the model, blue: the environment, none: the prompt"],
  version: ["policy version", (t, i, one) => (t.authors[i] === 1 ? one.step - 1 - t.version : null), 4, "orange: sampled by weights of earlier steps"],
  none: ["none", () => null, 1, ""],
};
const AUTHORS = ["prompt", "model", "environment"];
const TOKENS_AT_ONCE = 12000; // of a group, before a click asks for more
const WAIT = 250; // milliseconds after the last key until a search begins

let state = new URLSearchParams(location.search);
let view = null; // the list that is shown
let group = null; // the group that is shown, with the tokens of its completions
let asked = 0; // number of the latest list and group that were asked for: answers to earlier ones are dropped
let pick = ""; // which group of the next list to show: first or last
let timer = 0;

const at = (values, i) => (values === null || values === undefined ? null : values[i]);
const log = (value) => (value === null ? null : Math.log(value));

function short(value) {
  if (value === null || value === undefined) return "–";
  const text = value && Math.abs(value) < 1e-3 ? value.toExponential(1) : Number(value.toPrecision(3)).toString();
  return text.replaceAll("-", "−");
}

function make(tag, className, text) {
  const one = document.createElement(tag);
  if (className) one.className = className;
  if (text !== undefined) one.textContent = text;
  return one;
}

async function ask(path, fields) {
  let reply;
  try {
    reply = await fetch(`/api/${path}?${new URLSearchParams(fields)}`);
  } catch {
    throw new Error("The server does not answer: is `lm rollouts` still running?");
  }
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error);
  return found;
}

function problem(text) {
  find("problem").textContent = text;
  find("problem").hidden = !text;
}

// ---- the address ----

function go(changes, keep = false) {
  for (const [name, value] of Object.entries(changes))
    if (value === "" || value === null) state.delete(name);
    else state.set(name, value);
  const address = `?${state}`;
  if (keep) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  load();
}

const listed = () => Object.fromEntries(FIELDS.filter((name) => state.get(name)).map((name) => [name, state.get(name)]));

async function load() {
  const number = ++asked;
  const wanted = JSON.stringify(listed());
  if (!view || view.wanted !== wanted) {
    document.body.setAttribute("aria-busy", "true");
    try {
      const found = await ask("groups", listed());
      if (number !== asked) return;
      view = { ...found, wanted };
      problem([...found.damaged, found.no_tokens].filter(Boolean).join("\n"));
    } catch (error) {
      if (number !== asked) return;
      problem(error.message);
      return;
    } finally {
      if (number === asked) document.body.removeAttribute("aria-busy");
    }
    drawControls();
  }
  if (pick) {
    const one = view.groups[pick === "first" ? 0 : view.groups.length - 1];
    pick = "";
    if (one) {
      state.set("group", name(one));
      history.replaceState(null, "", `?${state}`);
    }
  }
  drawList();
  await loadGroup(number);
}

const name = (one) => `${one.step}.${one.group}`;

// ---- the list ----

function drawControls() {
  document.title = `${view.run}: rollouts`;
  find("title").textContent = `Rollouts of ${view.run}`;
  const stages = form.elements.stage;
  stages.replaceChildren(...view.stages.map((one) => new Option(one, one)));
  stages.value = view.stage;
  for (const field of ["steps", "search"])
    if (document.activeElement !== form.elements[field]) form.elements[field].value = state.get(field) || "";
  form.elements.sort.value = state.get("sort") || "newest";
  const chosen = (state.get("filter") || "").split(",");
  const boxes = Object.entries(FILTERS).map(([key, text]) => {
    const label = make("label");
    const box = make("input");
    Object.assign(box, { type: "checkbox", name: "filter", value: key, checked: chosen.includes(key) });
    label.title = TOLD[key];
    label.append(box, ` ${text} `, make("span", "quiet", view.filters[key].toLocaleString("en")));
    return label;
  });
  const focused = document.activeElement?.name === "filter" ? document.activeElement.value : "";
  find("filters").replaceChildren(make("legend", "quiet", "Only"), ...boxes);
  if (focused) form.querySelector(`[value="${focused}"]`)?.focus();
}

function drawList() {
  const { total, groups_found: groups, rollouts_found: rollouts } = view;
  const all = groups === total.groups && rollouts === total.rollouts;
  const steps = view.steps.length ? `, steps ${view.steps[0]} to ${view.steps[1]}` : "";
  const whole = `${total.rollouts.toLocaleString("en")} rollouts in ${total.groups.toLocaleString("en")} groups${steps}`;
  find("count").textContent = all ? whole : `${rollouts.toLocaleString("en")} rollouts in ${groups.toLocaleString("en")} groups of ${whole}`;
  find("groups").replaceChildren(...view.groups.map(line));
  find("paging").hidden = view.pages < 2;
  find("page").textContent = `page ${view.page} of ${view.pages}`;
  find("earlier").disabled = view.page <= 1;
  find("later").disabled = view.page >= view.pages;
  find("followed").hidden = !state.get("task");
  if (view.history) drawHistory(view.history);
}

function line(one) {
  const item = make("li");
  const link = make("a");
  const there = new URLSearchParams(state);
  there.set("group", name(one));
  link.href = `?${there}`;
  link.dataset.group = name(one);
  if (state.get("group") === name(one)) link.setAttribute("aria-current", "true");
  const numbers = make("div", "line");
  const rewards = make("span", "dots", dots(one.rewards));
  rewards.title = `rewards: ${one.rewards.slice(0, 64).map(short).join(", ")}`;
  numbers.append(make("b", "", `step ${one.step} · ${one.group}`), rewards, make("span", "", `mean ${short(one.mean)}`), make("span", "", `${short(one.length)} tokens`));
  if (one.gap !== null) numbers.append(make("span", "", `|Δ log p| ${short(one.gap)}`));
  if (one.hits < one.rewards.length) numbers.append(make("span", "", `${one.hits} of ${one.rewards.length} match`));
  for (const [key, count] of Object.entries(one.flags))
    if (count) numbers.append(make("span", "flag", key === "no_signal" || count === one.rewards.length ? FILTERS[key] : `${FILTERS[key]}: ${count}`));
  const prompt = make("div", "", one.prompt || "(empty prompt)");
  prompt.dir = "auto";
  link.append(numbers, prompt);
  item.append(link);
  return item;
}

// A circle for each completion: filled in proportion to its reward among those of the group.
function dots(rewards) {
  const known = rewards.filter((value) => value !== null);
  const [low, high] = [Math.min(0, ...known), Math.max(1, ...known)];
  const mark = (value) => (value === null ? "×" : "○◔◑◕●"[Math.round((4 * (value - low)) / (high - low))]);
  return rewards.slice(0, 16).map(mark).join("") + (rewards.length > 16 ? "…" : "");
}

function drawHistory(points) {
  const known = points.filter(([, mean]) => mean !== null);
  const draw = (tag, attributes, text) => {
    const one = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    if (text !== undefined) one.textContent = text;
    return one;
  };
  const [first, last] = [known[0]?.[0] ?? 0, known.at(-1)?.[0] ?? 1];
  const [low, high] = [Math.min(0, ...known.map((p) => p[1])), Math.max(1, ...known.map((p) => p[1]))];
  const x = (step) => 44 + (600 * (step - first)) / Math.max(1, last - first);
  const y = (mean) => 88 - (76 * (mean - low)) / (high - low);
  const svg = draw("svg", { viewBox: "0 0 660 112", role: "img", "aria-label": known.map(([step, mean]) => `step ${step}: ${short(mean)}`).slice(-50).join(", ") });
  svg.append(draw("polyline", { class: "curve", points: known.map(([step, mean]) => `${x(step)},${y(mean)}`).join(" ") }));
  for (const [step, mean] of known) {
    const point = draw("circle", { class: "point", cx: x(step), cy: y(mean), r: known.length > 200 ? 1 : 3 });
    point.append(draw("title", {}, `step ${step}: ${short(mean)}`));
    svg.append(point);
  }
  svg.append(draw("text", { x: 4, y: y(high) + 4 }, short(high)), draw("text", { x: 4, y: y(low) + 4 }, short(low)));
  svg.append(draw("text", { x: 44, y: 108 }, `step ${first}`), draw("text", { x: 644, y: 108, "text-anchor": "end" }, `step ${last}`));
  find("history").replaceChildren(svg);
}

// ---- a group ----

async function loadGroup(number) {
  const wanted = state.get("group");
  document.body.classList.toggle("chosen", Boolean(wanted));
  find("detail").hidden = !wanted;
  find("token").textContent = "";
  if (!wanted) {
    group = null;
    return;
  }
  const [step, place] = wanted.split(".");
  const key = JSON.stringify([view.stage, wanted]);
  if (group && group.key === key) return drawGroup();
  try {
    const found = await ask("group", { stage: view.stage, step, group: place });
    if (number !== asked) return;
    group = { ...found, key, step: Number(step), place: Number(place) };
  } catch (error) {
    if (number !== asked) return;
    find("detail").hidden = true;
    group = null;
    problem(error.message);
    return;
  }
  drawGroup();
  let left = TOKENS_AT_ONCE;
  for (const [index, one] of group.completions.entries()) {
    left -= one.sampled ?? 500;
    if (index && left < 0) break;
    if (!view.no_tokens) await loadTokens(group, index);
  }
}

async function loadTokens(shown, index) {
  try {
    shown.completions[index].tokens = await ask("tokens", { stage: view.stage, step: shown.step, group: shown.place, place: index });
  } catch (error) {
    problem(error.message);
    return;
  }
  if (group === shown) drawCompletion(index);
}

function drawGroup() {
  find("where").textContent = `Step ${group.step}, prompt ${group.place}: ${group.completions.length} ${group.completions.length === 1 ? "completion" : "completions"}`;
  find("follow").hidden = state.get("task") === group.task;
  find("prompt").replaceChildren(...group.prompt.flatMap(textBlock));
  find("completions").replaceChildren(...group.completions.map(() => make("article", "completion")));
  group.completions.forEach((_, index) => drawCompletion(index));
  const place = view.groups.findIndex((one) => name(one) === state.get("group"));
  find("previous").disabled = place <= 0 && view.page <= 1;
  find("next").disabled = place === view.groups.length - 1 && view.page >= view.pages;
  drawLegend();
  const [list, current] = [find("list"), document.querySelector("#groups [aria-current]")];
  if (current && list.scrollHeight > list.clientHeight) list.scrollTop = current.offsetTop - list.offsetTop - list.clientHeight / 2;
}

const colour = () => (state.get("colour") in COLOURS ? state.get("colour") : "logp");

function drawLegend() {
  const select = find("colour");
  const loaded = group.completions.filter((one) => one.tokens);
  const options = Object.entries(COLOURS).map(([key, [label, value]]) => {
    const known = key === "none" || !loaded.length || loaded.some((one) => one.tokens.ids.some((_, i) => value(one.tokens, i, group) !== null));
    const option = new Option(known ? label : `${label} (not stored)`, key);
    option.disabled = !known && key !== colour();
    return option;
  });
  select.replaceChildren(...options);
  select.value = colour();
  find("legend").textContent = COLOURS[colour()][3];
}

function textBlock(turn) {
  const block = make("div", `block ${turn.author === "model" ? "model" : turn.author === "environment" ? "environment" : "prompt"}`, turn.content);
  block.dir = "auto";
  return [make("p", "author", turn.author === "model" ? "model" : `${turn.author}, ${turn.role}`), block];
}

function drawCompletion(index) {
  const one = group.completions[index];
  const place = find("completions").children[index];
  const head = make("div", "line");
  head.append(make("b", "", `reward ${short(one.reward)}`));
  if (one.rewards.length > 1 || (one.rewards[0] && one.rewards[0][1] !== one.reward))
    for (const [key, value] of one.rewards) head.append(make("span", "reward", `${key} ${short(value)}`));
  head.append(make("span", "", `advantage ${short(one.advantage)}`));
  if (one.sampled !== null) head.append(make("span", "", `${one.sampled} tokens`));
  head.append(make("span", "", `policy version ${one.version}`));
  if (one.largest_gap !== null) head.append(make("span", "", `largest |Δ log p| ${short(one.largest_gap)}`));
  if (!one.trained) head.append(make("span", "flag", "not trained on"));
  if (one.finish !== "stop") head.append(make("span", "flag", one.finish === "length" ? "truncated" : "timed out"));
  if (one.errors) head.append(make("span", "flag", `tool errors: ${one.errors}`));
  if (one.tokens) place.replaceChildren(head, ...tokenBlocks(one.tokens, index));
  else {
    place.replaceChildren(head, ...one.turns.flatMap(textBlock));
    if (!view.no_tokens) {
      const more = make("button", "", "Show tokens");
      more.type = "button";
      more.addEventListener("click", () => loadTokens(group, index));
      place.append(more);
    }
  }
  if (one.tokens) drawLegend();
}

// The tokens after the prompt, a block for each author in turn.
function tokenBlocks(tokens, index) {
  const [, value, divisor] = COLOURS[colour()];
  const numbers = tokens.ids.map((_, i) => value(tokens, i, group));
  const scale = divisor || numbers.reduce((most, number) => Math.max(most, Math.abs(number ?? 0)), 1e-12);
  const parts = [];
  let block = null;
  let author = -1;
  tokens.ids.forEach((_, i) => {
    if (tokens.authors[i] === 0) return;
    if (tokens.authors[i] !== author) {
      author = tokens.authors[i];
      block = make("div", `block ${AUTHORS[author]}`);
      block.dir = "auto";
      parts.push(make("p", "author", AUTHORS[author]), block);
    }
    const span = make("span", tokens.special[i] ? "special" : tokens.pieces[i] === "" ? "part" : "", tokens.pieces[i]);
    span.dataset.token = i;
    span.dataset.completion = index;
    const number = numbers[i] === null ? 0 : Math.max(-1, Math.min(1, (colour() === "logp" ? -numbers[i] : numbers[i]) / scale));
    if (Math.abs(number) > 0.02) span.style.backgroundColor = `rgba(var(--${number > 0 ? "high" : "low"}), ${(0.65 * Math.abs(number)).toFixed(3)})`;
    block.append(span);
  });
  return parts;
}

function tellToken(event) {
  const span = event.target.closest?.("[data-token]");
  if (!span || !group) return;
  const one = group.completions[span.dataset.completion];
  const [t, i] = [one.tokens, Number(span.dataset.token)];
  const told = [JSON.stringify(t.pieces[i]), `id ${t.ids[i]}`, AUTHORS[t.authors[i]]];
  const add = (label, values) => at(values, i) !== null && told.push(`${label} ${short(at(values, i))}`);
  add("log p", t.logp);
  add("trainer", t.trainer);
  add("Δ", t.gap);
  add("ratio", t.ratio);
  add("KL", t.kl);
  add("advantage", t.advantage);
  if (at(t.clip, i)) told.push(t.clip[i] > 0 ? "clipped above" : "clipped below");
  if (t.authors[i] === 1) told.push(`version ${t.version}`);
  find("token").textContent = told.join(" · ");
}

function move(by) {
  if (!view || !view.groups.length) return;
  const place = view.groups.findIndex((one) => name(one) === state.get("group"));
  const next = view.groups[place < 0 ? 0 : place + by];
  if (next) go({ group: name(next) });
  else if (view.page + by >= 1 && view.page + by <= view.pages) {
    pick = by > 0 ? "first" : "last";
    go({ page: view.page + by });
  }
}

function recolour(key) {
  go({ colour: key }, true);
}

// ---- what the user does ----

const fresh = { page: "", group: "" }; // another list begins at its first page
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("change", (event) => {
  if (event.target.name === "filter") {
    const chosen = [...form.querySelectorAll("[name=filter]:checked")].map((box) => box.value);
    go({ ...fresh, filter: chosen.join(",") });
  } else if (event.target.name === "stage") go({ ...fresh, stage: event.target.value, steps: "", task: "" });
  else if (event.target.name === "sort") go({ ...fresh, sort: event.target.value });
});
form.addEventListener("input", (event) => {
  if (!["search", "steps"].includes(event.target.name)) return;
  clearTimeout(timer);
  timer = setTimeout(() => go({ ...fresh, [event.target.name]: event.target.value }, true), WAIT);
});
find("groups").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go({ group: link.dataset.group });
  find("detail").focus({ preventScroll: true });
  if (!matchMedia("(min-width: 52.01rem)").matches) window.scrollTo(0, 0);
});
find("earlier").addEventListener("click", () => go({ page: view.page - 1, group: "" }));
find("later").addEventListener("click", () => go({ page: view.page + 1, group: "" }));
find("previous").addEventListener("click", () => move(-1));
find("next").addEventListener("click", () => move(1));
find("back").addEventListener("click", () => go({ group: "" }));
find("follow").addEventListener("click", () => go({ ...fresh, group: state.get("group"), task: group.task, sort: "oldest", steps: "", search: "", filter: "" }));
find("unfollow").addEventListener("click", () => go({ page: "", task: "", sort: "" }));
find("colour").addEventListener("change", (event) => recolour(event.target.value));
find("completions").addEventListener("mouseover", tellToken);
find("completions").addEventListener("click", tellToken);
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=checkbox]), select");
  if (event.key === "Escape" && typing) event.target.blur();
  else if (event.key === "Escape" && state.get("group")) go({ group: "" });
  if (typing || event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.toLowerCase();
  if (key === "j") move(1);
  else if (key === "k") move(-1);
  else if (key === "/") form.elements.search.focus();
  else if (key === "c" && group) {
    const keys = [...find("colour").options].filter((option) => !option.disabled).map((option) => option.value);
    recolour(keys[(keys.indexOf(colour()) + 1) % keys.length]);
  } else return;
  event.preventDefault();
});
window.addEventListener("popstate", () => {
  state = new URLSearchParams(location.search);
  view = null; // the form must show the address again
  load();
});

load();
