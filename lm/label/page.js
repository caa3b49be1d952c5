// The page on which two answers are compared. What it shows comes from the server; it keeps a name and nothing else.
"use strict";

const find = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", b: "both bad", s: "skip" };
const SAID = { left: "left", right: "right", tie: "a tie", "both bad": "both bad", skip: "skipped" };
const RETRY = 2000; // milliseconds until a server that does not answer is asked again
const LOOK = 5000; // and until it is asked whether others have left something

let name = localStorage.getItem("lm-label-name") || "";
let view = null; // what the server said last
let busy = false; // a request is on its way: nothing else may be chosen
let plain = false; // show the texts as they are
let waiting = 0;

// Ask until there is an answer. A choice that was saved and whose answer was lost does no harm when it is sent again.
async function ask(action, body) {
  for (;;) {
    try {
      const reply = await fetch(`/api/${action}`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ name, ...body }),
      });
      return [reply.ok, await reply.json()];
    } catch {
      say("The server does not answer. This page keeps trying; your choice is not saved until it answers.", true);
      await new Promise((done) => setTimeout(done, RETRY));
    }
  }
}

async function send(action, body = {}, said = "") {
  if (busy) return;
  busy = true;
  clearTimeout(waiting);
  document.body.setAttribute("aria-busy", "true");
  const [good, reply] = await ask(action, body);
  busy = false;
  document.body.removeAttribute("aria-busy");
  say(good ? said : reply.error, true);
  if (good) show(reply);
  else if (action === "show") askName();
  else send("show", {}, reply.error); // what is shown may be out of date, for instance after another window
}

function say(text, bad = false) {
  find("status").textContent = text;
  find("status").classList.toggle("bad", bad);
}

function show(next) {
  const fresh = !view || view.pair !== next.pair;
  view = next;
  find("enter").hidden = true;
  find("who").hidden = find("done").hidden = false;
  find("who").textContent = name;
  const { yours, done, total, left } = next.progress;
  find("count").textContent = `${yours} by you, ${left} left for you`;
  find("done").max = total;
  find("done").value = done;
  find("done").title = `${done} of ${total} judgements by all`;
  find("undo").hidden = !next.last;
  find("last").textContent = next.last ? ` (${SAID[next.last.choice]})` : "";
  find("task").hidden = next.pair === null;
  find("end").hidden = next.pair !== null || next.busy;
  if (next.pair === null) return finish(next.busy);
  if (fresh) {
    draw();
    find("comment").value = "";
    for (const mark of strengths()) mark.checked = false;
    // Nothing that Space would press keeps the focus, and a screen reader goes on at the prompt.
    window.scrollTo(0, 0);
    find("prompt").focus({ preventScroll: true });
  }
}

function finish(others) {
  say(others ? "Other people are judging the remaining pairs. This page checks again by itself." : "There are no more pairs for you. Thank you.");
  if (others) waiting = setTimeout(() => send("show"), LOOK);
}

function draw() {
  fill(find("left"), view.left);
  fill(find("right"), view.right);
  find("prompt").replaceChildren(
    ...view.prompt.map((turn) => {
      const part = document.createElement("div");
      const role = document.createElement("h2");
      role.textContent = turn.role === "user" && view.prompt.length === 1 ? "Prompt" : turn.role;
      const text = document.createElement("div");
      text.className = "said";
      text.dir = "auto";
      fill(text, turn);
      part.append(role, text);
      return part;
    }),
  );
  find("source").setAttribute("aria-pressed", String(plain));
}

// `html` was made by the server and has no tag of the text's own; it is empty where the text is too long for it.
function fill(place, said) {
  const asText = plain || (!said.html && said.text.trim() !== "");
  place.classList.toggle("plain-text", asText);
  place.classList.toggle("empty", said.text.trim() === "");
  if (asText) place.textContent = said.text;
  else place.innerHTML = said.html;
}

function choose(choice) {
  if (!view || view.pair === null) return;
  const strength = strengths().find((mark) => mark.checked);
  send("choose", { pair: view.pair, choice, strength: strength ? Number(strength.value) : null, comment: find("comment").value });
}

function undo() {
  if (view && view.last) send("undo", { of: view.last.id });
}

function turn() {
  plain = !plain;
  if (view && view.pair !== null) draw();
}

function strengths() {
  return [...document.querySelectorAll("[name=strength]")];
}

function mark(value) {
  const chosen = strengths().find((one) => one.value === value);
  chosen.checked = !chosen.checked;
}

function askName() {
  view = null;
  clearTimeout(waiting);
  for (const id of ["task", "end", "who", "undo", "done"]) find(id).hidden = true;
  find("count").textContent = "";
  find("enter").hidden = false;
  find("name").value = name;
  find("name").focus();
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=radio])");
  if (typing && event.target.id === "comment" && ["Enter", "Escape"].includes(event.key)) find("prompt").focus();
  if (typing || event.repeat || event.ctrlKey || event.altKey || event.metaKey || !view) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "u") undo();
  else if (view.pair === null) return;
  else if (key in KEYS) choose(KEYS[key]);
  else if (["1", "2", "3"].includes(key)) mark(key);
  else if (key === "c") find("comment").focus();
  else if (key === "r") turn();
  else return;
  event.preventDefault();
});

for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => choose(button.dataset.choice));
find("undo").addEventListener("click", undo);
find("source").addEventListener("click", turn);
find("who").addEventListener("click", askName);
find("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  name = find("name").value;
  localStorage.setItem("lm-label-name", name);
  send("show");
});

if (name) send("show");
else askName();
