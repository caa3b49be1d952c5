// The chat page: asks the server's models over its protocol and shows what they answer. The conversation is kept in this browser.
import { element, markdown } from "./markdown.js";

const find = (id) => document.getElementById(id);
const KEPT = "lm-chat";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const ALTERNATIVES = 5;
const DEFAULT = "default"; // another name of the first model

let models = [];
// A turn is a message and the answers to it by model: {text, answers: {name: {text, tokens, state, error}}}.
let talk = { turns: [], chosen: [], settings: {}, shades: false };
const asking = new Map(); // requests on their way, by answer

function keep() {
  try {
    localStorage.setItem(KEPT, JSON.stringify(talk));
  } catch {
    say("This conversation is too long to be kept in the browser: export it.", true);
  }
}

function restore() {
  try {
    talk = { ...talk, ...JSON.parse(localStorage.getItem(KEPT) ?? "{}") };
  } catch {
    localStorage.removeItem(KEPT);
  }
  for (const turn of talk.turns)
    for (const answer of Object.values(turn.answers)) if (answer.state === "streaming") answer.state = "stopped";
}

function say(text, bad = false) {
  find("status").textContent = text;
  find("status").classList.toggle("bad", bad);
}

// ---- asking

function messages(until, name) {
  const system = find("system").value.trim();
  const found = system ? [{ role: "system", content: system }] : [];
  for (const turn of talk.turns.slice(0, until)) {
    const answer = turn.answers[name];
    if (answer && !answer.error) found.push({ role: "user", content: turn.text }, { role: "assistant", content: answer.text });
  }
  return [...found, { role: "user", content: talk.turns[until].text }];
}

function options() {
  return Object.fromEntries(NUMBERS.filter((id) => find(id).value !== "").map((id) => [id, Number(find(id).value)]));
}

async function ask(number, name) {
  const turn = talk.turns[number];
  const answer = (turn.answers[name] = { text: "", tokens: [], state: "streaming", error: "" });
  const control = new AbortController();
  asking.set(answer, control);
  buttons();
  draw();
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      signal: control.signal,
      body: JSON.stringify({
        model: name, messages: messages(number, name), stream: true, logprobs: true, top_logprobs: ALTERNATIVES, ...options(),
      }),
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    for await (const chunk of events(reply)) take(answer, chunk);
    if (answer.state === "streaming") throw new Error("the server ended the answer before its end");
  } catch (error) {
    answer.state = control.signal.aborted ? "stopped" : "failed";
    if (answer.state === "failed") answer.error = error instanceof TypeError ? "the server does not answer" : error.message;
  }
  asking.delete(answer);
  keep();
  buttons();
  draw();
  if (asking.size === 0) say(answer.state === "failed" ? "" : "Answered.");
}

function take(answer, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  for (const choice of chunk.choices) {
    answer.text += choice.delta.content ?? "";
    for (const one of choice.logprobs?.content ?? [])
      answer.tokens.push([shown(one), one.logprob, one.top_logprobs.map((other) => [shown(other), other.logprob])]);
    if (choice.finish_reason) answer.state = choice.finish_reason === "length" ? "cut" : "done";
  }
  later();
}

// A token as text; the bytes of a part of a character as numbers.
function shown(one) {
  return one.token.includes("\ufffd") ? one.bytes.map((byte) => `⟨${byte.toString(16)}⟩`).join("") : one.token;
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

function send(text) {
  if (!text.trim() || asking.size) return;
  if (talk.chosen.length === 0) return say("Choose a model that answers.", true);
  talk.turns.push({ text, answers: {} });
  askAll(talk.turns.length - 1);
}

function askAll(number, names = talk.chosen) {
  say("");
  talk.turns.length = number + 1;
  for (const name of names) ask(number, name);
  keep();
  window.scrollTo(0, document.body.scrollHeight);
}

function stop() {
  for (const control of asking.values()) control.abort();
}

// ---- drawing

let drawn = false;
function later() {
  if (drawn) return;
  drawn = true;
  requestAnimationFrame(() => {
    drawn = false;
    draw();
  });
}

// Parts are made again only where they have changed, so that a selection and the focus elsewhere stay.
function draw() {
  const atEnd = window.innerHeight + window.scrollY >= document.body.scrollHeight - 40;
  const place = find("talk");
  while (place.children.length > talk.turns.length) place.lastChild.remove();
  talk.turns.forEach((turn, number) => {
    if (!place.children[number]) place.append(element("section", element("div"), element("div")));
    const [asked, answers] = place.children[number].children;
    drawMessage(asked, turn, number);
    answers.className = "answers";
    const names = Object.keys(turn.answers);
    const wanted = names.join("\n");
    if (answers.dataset.names !== wanted) {
      answers.replaceChildren(...names.map(() => element("article")));
      answers.dataset.names = wanted;
    }
    names.forEach((name, column) => drawAnswer(answers.children[column], turn.answers[name], name, number));
  });
  if (atEnd && asking.size) window.scrollTo(0, document.body.scrollHeight);
}

function drawMessage(place, turn, number) {
  if (place.dataset.text === turn.text && !place.dataset.stale) return;
  place.dataset.text = turn.text;
  delete place.dataset.stale;
  place.className = "asked";
  const text = element("div", turn.text);
  text.className = "said";
  text.dir = "auto";
  const edit = button("Edit", () => editor(place, turn, number));
  edit.ariaLabel = `Edit message ${number + 1}`;
  place.replaceChildren(element("h2", "You"), text, edit);
}

function editor(place, turn, number) {
  if (asking.size) return;
  const field = element("textarea");
  field.value = turn.text;
  field.rows = Math.min(12, turn.text.split("\n").length + 1);
  field.ariaLabel = "Your message";
  const close = () => {
    place.dataset.stale = "1";
    draw();
    find("text").focus();
  };
  const save = () => {
    if (!field.value.trim() || asking.size) return;
    turn.text = field.value;
    turn.answers = {};
    close();
    askAll(number);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const send = button("Send", save);
  send.className = "strong";
  place.replaceChildren(element("h2", "You"), field, send, button("Cancel", close));
  field.focus();
}

const STATES = { stopped: "stopped", cut: "cut at the longest answer" };

function drawAnswer(place, answer, name, number) {
  const last = number === talk.turns.length - 1;
  const now = [answer.text.length, answer.tokens.length, answer.state, talk.shades, last, asking.size > 0].join();
  if (place.dataset.now === now) return;
  place.dataset.now = now;
  const text = element("div");
  text.className = talk.shades ? "said tokens" : "said";
  text.dir = "auto";
  if (talk.shades) text.append(...answer.tokens.map(token));
  else text.append(markdown(answer.text));
  text.classList.toggle("empty", answer.text === "" && answer.state !== "streaming" && !answer.error);
  const state = element("p", answer.error || (answer.state === "streaming" ? "…" : STATES[answer.state] ?? ""));
  state.className = answer.error ? "error" : "quiet";
  const parts = [element("h2", name), text, state];
  if (last && !asking.size) parts.push(button("Regenerate", () => askAll(number, [name])));
  place.replaceChildren(...parts);
}

function token([text, logp, others], number) {
  const made = element("span", text);
  made.className = `shade${Math.min(4, Math.floor(-logp / 0.7))}`; // a fifth for each factor of two
  made.tabIndex = number ? -1 : 0;
  made.addEventListener("mouseenter", () => hint(made, text, logp, others));
  made.addEventListener("focus", () => hint(made, text, logp, others));
  made.addEventListener("mouseleave", noHint);
  made.addEventListener("blur", noHint);
  return made;
}

function hint(near, text, logp, others) {
  const percent = (value) => `${Number((100 * Math.exp(value)).toPrecision(3))} %`;
  const row = ([name, value], chosen) => {
    const made = element("tr", element("td", JSON.stringify(name)), element("td", percent(value)));
    made.classList.toggle("chosen", chosen);
    return made;
  };
  const listed = others.some(([name]) => name === text);
  const rows = others.map((one) => row(one, one[0] === text));
  find("hint").replaceChildren(element("table", ...(listed ? rows : [...rows, row([text, logp], true)])));
  find("hint").hidden = false;
  const box = near.getBoundingClientRect();
  const own = find("hint").getBoundingClientRect();
  find("hint").style.left = `${Math.max(4, Math.min(box.left, window.innerWidth - own.width - 4))}px`;
  find("hint").style.top = `${box.bottom + own.height + 4 > window.innerHeight ? box.top - own.height - 4 : box.bottom + 4}px`;
}

function noHint() {
  find("hint").hidden = true;
}

function button(text, action) {
  const made = element("button", text);
  made.type = "button";
  made.className = "plain";
  made.addEventListener("click", action);
  return made;
}

function buttons() {
  find("stop").hidden = asking.size === 0;
  find("send").hidden = asking.size > 0;
  document.body.setAttribute("aria-busy", String(asking.size > 0));
}

// ---- models, settings, export

function drawModels() {
  const chosen = talk.chosen.filter((name) => models.includes(name));
  talk.chosen = chosen.length ? chosen : models.slice(0, 1);
  const boxes = models.map((name) => {
    const box = element("input");
    box.type = "checkbox";
    box.value = name;
    box.checked = talk.chosen.includes(name);
    box.addEventListener("change", () => {
      talk.chosen = [...find("models").querySelectorAll("input:checked")].map((one) => one.value);
      keep();
    });
    return element("label", box, ` ${name}`);
  });
  find("models").replaceChildren(find("models").firstElementChild, ...boxes);
}

function exported() {
  return Object.values(models).map((name) => {
    const turns = talk.turns.filter((turn) => turn.answers[name]?.text);
    const said = turns.flatMap((turn) => [
      { role: "user", content: turn.text }, { role: "assistant", content: turn.answers[name].text },
    ]);
    const system = find("system").value.trim();
    return { model: name, messages: [...(system ? [{ role: "system", content: system }] : []), ...said], settings: options() };
  }).filter((one) => one.messages.some((message) => message.role === "assistant"));
}

function download() {
  const lines = exported().map((one) => `${JSON.stringify(one)}\n`);
  if (lines.length === 0) return say("There is nothing to export yet.", true);
  const link = element("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = "chat.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}

// What the shades of tokens mean, while they are shown.
function showKey() {
  find("shades").setAttribute("aria-pressed", String(talk.shades));
  find("key").hidden = !talk.shades;
}

function shade() {
  talk.shades = !talk.shades;
  showKey();
  keep();
  draw();
}

function fresh() {
  stop();
  talk.turns = [];
  keep();
  draw();
  say("");
  find("text").focus();
}

const edit = () => document.querySelector("#talk section:last-child .asked button")?.click();
const again = () => document.querySelector("#talk section:last-child article button")?.click();
const ACTIONS = { "/": () => find("text").focus(), e: edit, r: again, p: shade, n: fresh };

function step(from, event) {
  const to = event.key === "ArrowRight" ? from.nextElementSibling : event.key === "ArrowLeft" ? from.previousElementSibling : null;
  if (!to) return;
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
  event.preventDefault();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return stop();
  if (event.target.matches(".tokens span")) step(event.target, event);
  if (event.target.matches("input:not([type=checkbox]), textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = ACTIONS[event.key];
  if (!action || event.repeat) return;
  event.preventDefault();
  action();
});

find("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("ask").requestSubmit();
});
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (asking.size) return;
  const text = find("text").value;
  find("text").value = "";
  send(text);
});
find("stop").addEventListener("click", stop);
find("new").addEventListener("click", fresh);
find("shades").addEventListener("click", shade);
find("export").addEventListener("click", download);
for (const id of [...NUMBERS, "system"])
  find(id).addEventListener("change", () => {
    talk.settings = Object.fromEntries([...NUMBERS, "system"].map((one) => [one, find(one).value]));
    keep();
  });

async function begin() {
  restore();
  for (const [id, value] of Object.entries(talk.settings)) find(id).value = value;
  showKey();
  draw();
  try {
    const reply = await fetch("/v1/models");
    models = (await reply.json()).data.map((one) => one.id).filter((name) => name !== DEFAULT);
  } catch {
    return say("The server does not answer.", true);
  }
  drawModels();
}

begin();
