"use strict";
const STORED = 4_000_000; // letters of a conversation in localStorage: browsers allow five million
const LARGE = 1_000_000; // letters of an image's data URL; a larger image is sent as a JPEG of at most EDGE pixels
const EDGE = 2048;
const PLACE = "smolvlm_exp.chat";
const BOTH = "side by side";

const $ = id => document.getElementById(id);
let models = []; // as /v1/models lists them: { id, root }
let turns = []; // { text, images, answers: { model: { text, note, problem } } }
let attached = []; // data URLs
let running = null; // an AbortController, while answers come

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The server

async function api(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(PLACE);
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    if (response.status !== 401) throw new Error(await problem(response));
    sessionStorage.setItem(PLACE, await askForKey());
  }
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

function askForKey() {
  $("key_text").value = "";
  if (!$("key").open) $("key").showModal();
  return new Promise(resolve => {
    $("key").oncancel = event => event.preventDefault();
    $("key").querySelector("form").onsubmit = event => {
      event.preventDefault();
      $("key").close();
      resolve($("key_text").value);
    };
  });
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended before its answer did");
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}

// A turn and its answers

function question(turn) {
  const images = turn.images.map(url => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: [...images, { type: "text", text: turn.text }] };
}

function conversation(model, last) {
  // What `model` is sent: its own answers to earlier turns, or the other model's where it gave none.
  const messages = [];
  for (const turn of turns.slice(0, turns.indexOf(last))) {
    const answer = [turn.answers[model], ...Object.values(turn.answers)].find(each => each?.text && !each.problem);
    if (answer) messages.push(question(turn), { role: "assistant", content: answer.text });
  }
  return [...messages, question(last)];
}

function unanswered() {
  return { text: "", note: "stopped", problem: "" }; // what is left of an answer that a reload ends
}

async function generate(turn, model, signal) {
  const answer = (turn.answers[model] = unanswered());
  const temperature = Number($("temperature").value);
  const request = { model, messages: conversation(model, turn), stream: true, stream_options: { include_usage: true } };
  if (temperature) Object.assign(request, { temperature, seed: Math.floor(Math.random() * 2 ** 31) });
  if ($("max_tokens").value) request.max_tokens = Number($("max_tokens").value);
  const begun = performance.now();
  let cut = "";
  show(turn, model, true);
  try {
    const response = await api("/v1/chat/completions", { method: "POST", body: JSON.stringify(request), signal });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      answer.text += event.choices[0]?.delta.content ?? "";
      if (event.choices[0]?.finish_reason === "length") cut = ", cut at max tokens";
      if (event.usage) {
        const { prompt_tokens: read, prompt_tokens_details: details, completion_tokens: count } = event.usage;
        const seconds = ((performance.now() - begun) / 1000).toFixed(1);
        answer.note = `${count} tokens in ${seconds} s${cut}; prompt ${read} (${details.cached_tokens} cached)`;
      }
      show(turn, model, true);
    }
  } catch (error) {
    if (!signal.aborted) answer.problem = error.message;
  }
  show(turn, model, false);
}

async function answer(turn, names) {
  running = new AbortController();
  busy(true);
  await Promise.all(names.map(name => generate(turn, name, running.signal)));
  running = null;
  busy(false);
  save();
}

function ask(text, images) {
  const names = models.map(model => model.id);
  const chosen = $("models").value === BOTH ? names : [$("models").value];
  const turn = { text, images, answers: Object.fromEntries(chosen.map(name => [name, unanswered()])) };
  turns.push(turn);
  $("log").append(element(turn, chosen));
  $("log").scrollTop = $("log").scrollHeight;
  say("");
  save();
  return answer(turn, chosen);
}

// What is seen

function element(turn, names) {
  const images = turn.images.map((src, i) => make("img", { src, alt: `Image ${i + 1} of your message` }));
  const user = make("div", { className: "user" }, make("div", { className: "images" }, ...images));
  user.append(make("p", { textContent: turn.text }));
  const answers = make("div", { className: "answers" });
  turn.view = make("div", { className: names.length > 1 ? "turn several" : "turn" }, user, answers);
  turn.parts = {};
  for (const name of names) {
    const [words, problem, note] = ["p", "p", "span"].map(tag => make(tag));
    words.className = "words";
    problem.className = "problem";
    const copy = make("button", { type: "button", className: "copy", textContent: "Copy" });
    copy.onclick = () => copyText(turn.answers[name].text, copy);
    const retry = make("button", { type: "button", className: "retry", textContent: "Retry" });
    retry.onclick = () => running || answer(turn, [name]);
    const foot = make("div", { className: "foot" }, copy, retry, note);
    const view = make("div", { className: "answer" }, words, problem, foot);
    if (models.length > 1) view.prepend(make("h3", { textContent: name }));
    turn.parts[name] = { view, words, problem, note, copy };
    answers.append(view);
  }
  return turn.view;
}

function show(turn, model, waiting) {
  const { view, words, problem, note, copy } = turn.parts[model];
  const { scrollTop, scrollHeight, clientHeight } = $("log");
  const atEnd = scrollTop + clientHeight > scrollHeight - 60;
  const answer = turn.answers[model];
  view.classList.toggle("waiting", waiting);
  words.textContent = answer.text;
  problem.textContent = answer.problem;
  note.textContent = waiting ? (answer.text ? "" : "waiting for the model") : answer.problem ? "" : answer.note;
  copy.hidden = !answer.text;
  if (atEnd) $("log").scrollTop = $("log").scrollHeight;
}

function render() {
  const views = turns.map(turn => element(turn, Object.keys(turn.answers)));
  $("log").replaceChildren(...(views.length ? views : [welcome]));
  for (const turn of turns) for (const name of Object.keys(turn.answers)) show(turn, name, false);
  $("log").scrollTop = $("log").scrollHeight;
}

const welcome = $("welcome");

function busy(on) {
  welcome.remove();
  $("send").hidden = $("reset").disabled = on;
  $("stop").hidden = !on;
}

function say(text) {
  $("status").textContent = text;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page that did not come by https or from this machine has no clipboard
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// Images

async function attach(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      say(`${file.name} is not an image`);
      continue;
    }
    attached.push(await dataUrl(file));
    showAttached();
  }
}

async function dataUrl(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  return url.length > LARGE ? shrunk(file).catch(() => url) : url; // what this browser cannot read the server may
}

async function shrunk(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, EDGE / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

function showAttached() {
  const thumbs = attached.map((src, i) => {
    const remove = make("button", { type: "button", textContent: "×", ariaLabel: `Remove image ${i + 1}` });
    remove.onclick = () => {
      attached.splice(i, 1);
      showAttached();
    };
    return make("div", { className: "thumb" }, make("img", { src, alt: `Image ${i + 1} to send` }), remove);
  });
  $("attached").replaceChildren(...thumbs);
}

// What survives a reload

function save() {
  if (!models.length) return; // nothing was restored yet
  const served = models.map(model => model.root).join();
  const settings = Object.fromEntries(["temperature", "max_tokens", "models"].map(id => [id, $(id).value]));
  const kept = turns.map(({ text, images, answers }) => JSON.stringify({ text, images, answers }));
  const all = kept.length;
  while (kept.length && kept.reduce((sum, turn) => sum + turn.length, 0) > STORED) kept.shift();
  if (kept.length < all) say(`Too much for a reload: it would bring back the last ${kept.length} of ${all} turns.`);
  try {
    localStorage.setItem(PLACE, `{"served":${JSON.stringify(served)},"settings":${JSON.stringify(settings)},"turns":[${kept}]}`);
  } catch {
    say("This browser keeps nothing for a reload.");
  }
}

function restore() {
  try {
    const saved = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    if (saved.served !== models.map(model => model.root).join()) return; // of another run
    for (const [id, value] of Object.entries(saved.settings)) $(id).value = value;
    if (!$("models").value) $("models").selectedIndex = 0;
    turns = saved.turns;
    render();
  } catch {
    localStorage.removeItem(PLACE);
    turns = [];
  }
}

// Begin

async function begin() {
  models = (await (await api("/v1/models")).json()).data;
  const names = models.map(model => model.id);
  $("model").textContent = names.join(" and ");
  document.title = `${names[0]} · smolvlm_exp`;
  $("root").textContent = models.map(model => model.root).join(" on "); // an adapter on its base
  $("models").append(...(names.length > 1 ? [...names, BOTH] : names).map(name => make("option", { textContent: name })));
  $("models").hidden = names.length < 2;
  restore();
  for (const { question, image } of await (await api("/examples")).json()) {
    const words = make("span", { textContent: question });
    const card = make("button", { type: "button" }, make("img", { src: image, alt: "An example image" }), words);
    card.onclick = () => running || ask(question, [image]);
    welcome.querySelector("#examples").append(card);
  }
}

$("form").onsubmit = event => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (running || !models.length) return;
  if (!text) return say(attached.length ? "Add a question about it." : "");
  $("text").value = "";
  const images = attached;
  attached = [];
  showAttached();
  ask(text, images);
};
$("text").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
};
$("stop").onclick = () => running?.abort();
$("reset").onclick = () => {
  turns = [];
  say("");
  save();
  render();
  $("text").focus();
};
for (const id of ["temperature", "max_tokens", "models"]) $(id).onchange = save;
$("file").onchange = async event => {
  await attach([...event.target.files]);
  event.target.value = "";
};
window.onpagehide = save;
document.onkeydown = event => {
  if (event.key === "Escape") running?.abort();
};
document.onclick = event => {
  if (!$("settings").contains(event.target)) $("settings").open = false;
};
document.ondragover = event => {
  event.preventDefault();
  document.body.classList.add("dragging");
};
document.ondragleave = event => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
};
document.ondrop = event => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  attach([...event.dataTransfer.files]);
};
document.onpaste = event => {
  if (event.clipboardData.files.length) event.preventDefault();
  attach([...event.clipboardData.files]);
};
begin().catch(error => say(`The server does not answer: ${error.message}`));
