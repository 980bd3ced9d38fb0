// The page: draws the overview that /hob/v1/events sends every second, and asks for chat and classification.
// Text from outside becomes text nodes only, never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const MOST_S = 120; // a chart shows at most this, and at least LEAST_S
const LEAST_S = 20;
const COLOURS = ["c1", "c2", "c3", "c4", "c5", "c6"];

/** An element with a class and children (elements or texts). */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const number = (value) => Math.round(value).toLocaleString("en");
const megabytes = (bytes) => (bytes < 1e7 ? (bytes / 1e6).toFixed(1) : number(bytes / 1e6)) + " MB";
const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %";

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129600 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

function markEmpty(panel, isEmpty) {
  $(panel).classList.toggle("is-empty", isEmpty);
}

// ---- charts ----

/** A line chart over up to two minutes. lines: [{label, colour, values, area}], values as long as times. */
class Chart {
  constructor(host, unit) {
    this.host = host;
    this.unit = unit;
    this.at = null;
    host.addEventListener("pointermove", (event) => this.point(event));
    host.addEventListener("pointerleave", () => { this.at = null; this.draw(); });
  }

  show(now, times, lines) {
    const span = Math.min(MOST_S, Math.max(LEAST_S, now - (times[0] ?? now)));
    Object.assign(this, { now, times, lines, span });
    this.draw();
  }

  point(event) {
    const box = this.svg?.getBoundingClientRect();
    if (!box) return;
    this.at = this.now - this.span * (1 - (event.clientX - box.left) / box.width);
    this.draw();
  }

  draw() {
    if (!this.lines) return;
    const top = niceTop(Math.max(0, ...this.lines.flatMap((line) => line.values.filter((v) => v !== null))));
    const x = (time) => 100 - (100 * (this.now - time)) / this.span;
    const y = (value) => 100 - (100 * value) / top;
    this.svg = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none" });
    for (const level of [0, 50, 100]) this.svg.append(svg("line", { class: "grid", x1: 0, x2: 100, y1: level, y2: level }));
    for (const line of this.lines) this.svg.append(...curve(line, this.times, x, y));
    const labels = [make("span", "x at-start", `${duration(this.span)} ago`), make("span", "x at-end", "now")];
    labels[0].style.left = "44px";
    labels[1].style.right = "0";
    for (const [level, value] of [[0, top], [50, top / 2], [100, 0]]) {
      const label = make("span", "y", value >= 1000 ? `${+(value / 1000).toFixed(1)}k` : String(+value.toFixed(1)));
      label.style.top = `calc((100% - 18px) * ${level / 100})`;
      labels.push(label);
    }
    this.host.replaceChildren(this.svg, ...labels, ...this.tip(x));
  }

  tip(x) {
    if (this.at === null || !this.times.length) return [];
    let best = 0;
    this.times.forEach((time, i) => { if (Math.abs(time - this.at) < Math.abs(this.times[best] - this.at)) best = i; });
    const at = x(this.times[best]);
    if (at < 0) return [];
    this.svg.append(svg("line", { class: "cross", x1: at, x2: at, y1: 0, y2: 100 }));
    const said = this.lines.map((line) => `${line.label} ${line.values[best] === null ? "–" : number(line.values[best])}`);
    const tip = make("span", "tip", `${said.join(" · ")} ${this.unit}`);
    tip.style.left = `calc(44px + (100% - 44px) * ${at / 100})`;
    tip.style.transform = `translateX(${at > 50 ? "calc(-100% - 8px)" : "8px"})`;
    return [tip];
  }
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** The smallest round number that is not below the value. */
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 1.5, 2, 3, 4, 6, 8, 10].map((step) => step * power).find((step) => step >= value);
}

/** Pieces of line where there are values; a gap of seconds breaks it. An area under it if asked for. */
function curve(line, times, x, y) {
  const pieces = [];
  let last = null;
  times.forEach((time, i) => {
    const value = line.values[i];
    if (value === null || x(time) < 0) return;
    if (last === null || (line.area && time - last > 3)) pieces.push([]);
    pieces[pieces.length - 1].push([x(time), y(value)]);
    last = time;
  });
  return pieces.flatMap((points) => {
    const d = points.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(2)} ${py.toFixed(2)}`).join("");
    const ends = `L${points[points.length - 1][0].toFixed(2)} 100L${points[0][0].toFixed(2)} 100Z`;
    const one = points.length === 1 ? `${d}l0.4 0` : d;
    return [
      ...(line.area ? [svg("path", { class: `area ${line.colour}`, d: d + ends })] : []),
      svg("path", { class: line.colour, d: one }),
    ];
  });
}

// ---- the service ----

const throughput = new Chart($("chart-throughput"), "tok/s");
const ttft = new Chart($("chart-ttft"), "ms");
const colourOfApp = new Map();

function appColour(app) {
  if (!colourOfApp.has(app)) colourOfApp.set(app, COLOURS[colourOfApp.size % COLOURS.length]);
  return colourOfApp.get(app);
}

function show(overview) {
  const { series } = overview;
  showStatus(overview);
  showTiles(overview);
  throughput.show(overview.time, series.time, [
    { label: "read", colour: "c2", values: series.prompt_tok_s },
    { label: "generated", colour: "c1", values: series.output_tok_s, area: true },
  ]);
  ttft.show(overview.time, series.time, [{ label: "median", colour: "c3", values: series.ttft_ms }]);
  showMemory(overview.memory);
  showApps(overview.apps);
  showRequests(overview.requests, overview.background_waits_for);
  showModels(overview.models);
  showContexts(overview.contexts, overview.memory.disk_bytes);
  showRefusals(overview.refusals, overview.num_refusals);
}

function showStatus(overview) {
  const model = overview.models.find((each) => each.is_loaded);
  const error = overview.models.find((each) => each.error)?.error;
  $("status").className = model ? "status live" : "status lost";
  $("status").lastElementChild.textContent = model
    ? `${model.name} · up ${duration(overview.uptime_s)} · ${overview.version}`
    : error || "no model is loaded";
}

function showTiles(overview) {
  const { series } = overview;
  const isNow = series.time.length && overview.time - series.time[series.time.length - 1] < 3;
  $("now-output").textContent = number(isNow ? series.output_tok_s[series.output_tok_s.length - 1] : 0);
  const lately = series.ttft_ms.filter((value, i) => value !== null && overview.time - series.time[i] < 15);
  $("now-ttft").textContent = lately.length ? number(lately[lately.length - 1]) : "–";
  $("now-requests").textContent = number(overview.requests.length);
  const waiting = overview.engine.num_waiting;
  $("now-queue").textContent = waiting ? `${waiting} queued` : overview.requests.length === 1 ? "request" : "requests";
  $("now-memory").textContent = number(overview.memory.pss_bytes / 1e6);
}

function showMemory(memory) {
  const pressure = memory.pressure === "none" ? "" : `, the system is short of memory (${memory.pressure})`;
  $("memory-total").textContent = `${megabytes(memory.reserved_bytes)} reserved of a budget of ` +
    `${megabytes(memory.budget_bytes)}; the processes take ${megabytes(memory.pss_bytes)}${pressure}`;
  const bars = memory.parts.map((part, i) => {
    const bar = $("memory-bar").children[i] || make("i");
    bar.className = COLOURS[i % COLOURS.length];
    bar.style.flexGrow = part.bytes / 1e6;
    bar.style.display = part.bytes ? "" : "none";
    bar.title = `${part.name}: ${megabytes(part.bytes)}`;
    return bar;
  });
  if ($("memory-bar").children.length !== bars.length) $("memory-bar").replaceChildren(...bars);
  $("memory-parts").replaceChildren(...memory.parts.map((part, i) =>
    make("li", "", make("i", `key ${COLOURS[i % COLOURS.length]}`), `${part.name} `, make("b", "", megabytes(part.bytes)))));
}

function meter(share, colour) {
  const fill = make("i", colour);
  fill.style.width = `${100 * share}%`;
  return make("span", "meter", fill);
}

function cell(text, className) {
  const found = make("td", className, text);
  if (className === "app") found.title = text;
  return found;
}

function showApps(apps) {
  markEmpty("panel-apps", !apps.length);
  $("apps").replaceChildren(...apps.map((app) => make("tr", "",
    cell(app.app, "app"),
    make("td", "n", meter(app.share || 0, appColour(app.app)), make("span", "share", app.share === null ? "–" : percent(app.share))),
    cell(app.num_waiting ? `${app.num_running} + ${app.num_waiting}` : app.num_running, "n"),
    cell(number(app.num_requests), "n minor"),
    cell(number(app.num_prompt_tokens), "n minor"),
    cell(number(app.num_cached_tokens), "n minor"),
    cell(number(app.num_output_tokens), "n"))));
}

/** '/v1/chat/completions' -> 'chat', '/hob/v1/contexts/ctx-1/generate' -> 'context turn'. */
function shortName(endpoint) {
  const name = endpoint.replace(/^\/(hob\/)?v1\//, "").replace("chat/completions", "chat");
  return name.startsWith("contexts/") ? "context turn" : name;
}

function showRequests(requests, waitsFor) {
  markEmpty("panel-requests", !requests.length);
  const shown = requests.slice(0, 12);
  $("requests-note").textContent = [
    requests.length > shown.length ? `the first ${shown.length} of ${requests.length}` : "",
    waitsFor ? `background work waits: ${waitsFor}` : "",
  ].filter(Boolean).join("; ");
  $("requests").replaceChildren(...shown.map((request) => make("tr", "",
    cell(request.app, "app"),
    cell(shortName(request.endpoint)),
    cell(request.class || "–", "minor"),
    make("td", "", make("span", `tag ${request.state}`, request.state)),
    cell(number(request.num_prompt_tokens), "n minor"),
    cell(number(request.num_output_tokens), "n"),
    cell(`${request.age_s.toFixed(1)} s`, "n"))));
}

function showModels(models) {
  $("models").replaceChildren(...models.map((model) => {
    const facts = {};
    if (model.architecture) Object.assign(facts, {
      kind: `${model.architecture}, ${number(model.num_parameters / 1e6)} M parameters, ${model.quantisation}`,
      weights: megabytes(model.weight_bytes),
      context: `${number(model.context_length)} tokens, ${number(model.kv_bytes_per_token)} bytes each`,
      computes: `${model.isa} on ${model.num_threads} thread${model.num_threads === 1 ? "" : "s"}`,
    });
    if (model.resident) {
      const { num_bytes, leases, is_pinned, idle_s } = model.resident;
      facts.reserved = megabytes(num_bytes) + (is_pinned ? ", pinned" : "") + (idle_s ? `, idle for ${duration(idle_s)}` : "");
      if (leases.length) facts["held by"] = leases.join(", ");
    }
    return make("div", "model",
      make("h3", "", model.name, make("span", model.is_loaded ? "tag answering" : "tag", model.is_loaded ? "loaded" : "not loaded")),
      make("dl", "", ...Object.entries(facts).flatMap(([name, fact]) => [make("dt", "", name), make("dd", "", fact)])));
  }));
}

function showContexts(contexts, diskBytes) {
  markEmpty("panel-contexts", !contexts.length);
  $("contexts-note").textContent = `${megabytes(diskBytes)} on disk`;
  $("contexts").replaceChildren(...contexts.map((each) => make("tr", "",
    cell(each.app, "app"), cell(number(each.num_contexts), "n"), cell(number(each.num_tokens), "n"))));
}

function showRefusals(refusals, count) {
  markEmpty("panel-refusals", !refusals.length);
  $("refusals-note").textContent = count ? `${number(count)} since start` : "";
  $("refusals").replaceChildren(...refusals.slice(0, 20).map((each) => make("li", "",
    make("time", "", new Date(1000 * each.time).toLocaleTimeString()),
    make("b", "", `${each.status} ${each.code}`),
    make("div", "", `${each.app === "-" ? "not identified" : each.app} · ${each.endpoint}`),
    make("span", "", each.message))));
}

async function watch() {
  for (;;) {
    try {
      for await (const overview of events("/hob/v1/events", {})) show(overview);
    } catch (error) {
      if (error.status === 403) return lost(error.message);
    }
    lost("the service does not answer; trying again");
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function lost(why) {
  $("status").className = "status lost";
  $("status").lastElementChild.textContent = why;
}

// ---- asking ----

/** Objects of a reply of server-sent events. Throws an Error with the service's own words. */
async function* events(path, options) {
  const response = await fetch(path, options);
  if (!response.ok) throw await refused(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function refused(response) {
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message || `the service answered ${response.status}`);
  error.status = response.status;
  return error;
}

function post(body) {
  const headers = { "content-type": "application/json", "x-hob-app": "dashboard", "x-hob-class": "interactive" };
  return { method: "POST", headers, body: JSON.stringify(body) };
}

const history = [];

async function chat(text) {
  history.push({ role: "user", content: text });
  $("talk").append(make("div", "said user", text));
  const bubble = $("talk").appendChild(make("div", "said model"));
  const start = performance.now();
  let first = null, usage = null, said = "";
  try {
    const body = {
      model: "default", messages: history, stream: true, stream_options: { include_usage: true },
      temperature: Number($("chat-temperature").value), max_tokens: Number($("chat-tokens").value),
      logprobs: true, top_logprobs: 5,
    };
    for await (const event of events("/v1/chat/completions", post(body))) {
      usage = event.usage || usage;
      const choice = event.choices[0];
      if (!choice) continue;
      said += choice.delta.content || "";
      for (const token of choice.logprobs?.content || []) {
        first ??= performance.now();
        bubble.append(tokenSpan(token));
      }
      $("talk").scrollTop = $("talk").scrollHeight;
    }
    history.push({ role: "assistant", content: said });
  } catch (error) {
    history.pop();
    bubble.classList.add("error");
    bubble.append(error.message);
  }
  $("talk").append(make("p", "took", took(start, first, usage)));
  $("talk").scrollTop = $("talk").scrollHeight;
}

function took(start, first, usage) {
  if (!usage || first === null) return "";
  const seconds = (performance.now() - first) / 1000;
  const rate = usage.completion_tokens > 1 ? ` · ${number((usage.completion_tokens - 1) / seconds)} tok/s` : "";
  const cached = usage.prompt_tokens_details.cached_tokens;
  return `${usage.prompt_tokens} tokens read (${cached} cached) · ${usage.completion_tokens} written · ` +
    `first after ${number(first - start)} ms${rate}`;
}

function tokenSpan(token) {
  const p = Math.exp(token.logprob);
  const level = p < 0.2 ? " p0" : p < 0.5 ? " p1" : p < 0.8 ? " p2" : "";
  const text = token.bytes ? new TextDecoder().decode(new Uint8Array(token.bytes)) : token.token;
  const blank = /[^\s\p{C}]/u.test(text) ? "" : " blank";  // part of a character, a line break: still to be pointed at
  const span = make("span", `tok${level}${blank}`, text);
  span.tabIndex = 0;
  for (const kind of ["pointerenter", "click", "focus"]) span.addEventListener(kind, () => inspect(span, token));
  return span;
}

function inspect(span, token) {
  document.querySelector(".tok.chosen")?.classList.remove("chosen");
  span.classList.add("chosen");
  const p = Math.exp(token.logprob);
  $("token-note").textContent = `${shown(token.token)} had ${percent(p)}`;
  const tops = token.top_logprobs.map((top) => [shown(top.token), Math.exp(top.logprob), top.token === token.token]);
  if (!tops.some((top) => top[2])) tops.push([shown(token.token), p, true]);
  $("token-bars").replaceChildren(...tops.map((top) => bar(...top, "c3")));
  $("panel-tokens").classList.remove("is-empty");
}

const shown = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣");

function bar(label, share, isBest, colour) {
  const name = make("code", "", label);
  name.title = label;
  return make("div", isBest ? "bar best" : "bar", name, meter(share, colour), make("span", "n", percent(share)));
}

async function classify() {
  const labels = $("classify-labels").value.split(",").map((label) => label.trim()).filter(Boolean);
  const start = performance.now();
  const response = await fetch("/hob/v1/classify", post({ text: $("classify-text").value, labels }));
  if (!response.ok) throw await refused(response);
  const reply = await response.json();
  const scored = [...reply.labels].sort((a, b) => b.probability - a.probability);
  $("classify-bars").replaceChildren(...scored.map((each) =>
    bar(each.label, each.probability, each.label === reply.label, "c2")));
  $("classify-note").textContent = `${number(performance.now() - start)} ms · ${reply.usage.prompt_tokens} tokens`;
}

/** Run work with a button disabled; an error is shown in the note. */
async function during(button, note, work) {
  button.disabled = true;
  try {
    await work();
  } catch (error) {
    note.textContent = error.message;
  }
  button.disabled = false;
}

// ---- start ----

function route() {
  const wanted = location.hash === "#playground" ? "playground" : "service";
  for (const view of ["service", "playground"]) $(view).hidden = view !== wanted;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${wanted}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  scrollTo(0, 0);
}

$("chat").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("chat-text").value.trim() || $("chat-text").placeholder;
  $("chat-text").value = "";
  during($("chat-send"), $("token-note"), () => chat(text));
});
$("chat-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!$("chat-send").disabled) $("chat").requestSubmit();
  }
});
$("chat-clear").addEventListener("click", () => {
  history.length = 0;
  $("talk").replaceChildren($("talk").firstElementChild);
});
$("chat-temperature").addEventListener("input", () => {
  $("chat-temperature-value").textContent = $("chat-temperature").value;
});
$("classify").addEventListener("submit", (event) => {
  event.preventDefault();
  during($("classify-send"), $("classify-note"), classify);
});
addEventListener("hashchange", route);
for (const panel of ["apps", "requests", "contexts", "refusals", "tokens"]) markEmpty(`panel-${panel}`, true);
route();
watch();
