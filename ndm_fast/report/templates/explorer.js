// The state of the page is its address; every change pushes a new one and asks the server for it.
"use strict";

const at = (id) => document.getElementById(id);
const FIELDS = ["site", "metric", "k", "within", "window"];
let about = null;
let latest = 0; // number of the last question; answers to earlier ones are dropped

// Text enters the page only here and as form values, never as markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

async function ask(path, parameters) {
  const answer = await fetch(`${path}?${parameters}`);
  const content = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function complain(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

function siteNow() {
  return about.sites.find((site) => site.name === at("site").value) ?? about.sites[0];
}

function drawSubspaces(chosen) {
  const widths = siteNow().widths;
  at("subspaces").replaceChildren(
    ...widths.map((width, s) => {
      const box = element("input", { type: "checkbox", value: s, onchange: () => go({}) });
      box.checked = chosen === null || chosen.includes(s);
      return element("label", {}, box, ` s${s} · ${width}`);
    }),
  );
}

function chosenSubspaces() {
  const boxes = [...at("subspaces").querySelectorAll("input")];
  const on = boxes.filter((box) => box.checked).map((box) => box.value);
  return on.length === boxes.length ? "" : on.join(",");
}

// The parameters of the page as it stands, with some changed; null takes one away.
function parameters(changes) {
  const current = new URLSearchParams(location.search);
  const next = new URLSearchParams();
  for (const name of ["text", "row", "token"]) if (current.has(name)) next.set(name, current.get(name));
  for (const name of FIELDS) if (at(name).value !== "") next.set(name, at(name).value);
  if (chosenSubspaces()) next.set("subspaces", chosenSubspaces());
  for (const [name, value] of Object.entries(changes)) {
    if (value === null) next.delete(name);
    else next.set(name, value);
  }
  return next;
}

function go(changes) {
  if (at("subspaces").querySelector("input") && !at("subspaces").querySelector("input:checked")) {
    return complain("no subspace is chosen: tick at least one");
  }
  const next = parameters(changes);
  if (!next.has("text") && !next.has("row")) return history.replaceState(null, "", `?${next}`);
  history.pushState(null, "", `?${next}`);
  return show();
}

function stretches(parts) {
  return parts.map((part) => element("span", part.special ? { class: "special" } : {}, part.text));
}

function neighbor(view) {
  const numbers = `distance ${view.distance.toPrecision(4)}, norm ${view.norm.toPrecision(4)}`;
  const target = element(
    "button",
    { type: "button", class: "target", title: "Take this token as the query",
      onclick: () => go({ row: view.row, text: null, token: null }) },
    view.target,
  );
  return element(
    "li", { "data-row": view.row },
    element("span", { class: "distance", title: numbers }, view.relative.toFixed(3)),
    element("span", { class: "text" },
      element("span", {}, ...stretches(view.before)), target, element("span", {}, ...stretches(view.after))),
    element("span", { class: "where" }, `pos ${view.position} · doc ${view.document} · norm ${view.norm.toPrecision(3)}`),
  );
}

function card(part) {
  const count = part.within === null ? "" : ` · ${part.within.toLocaleString("en")} within`;
  const heading = element("h3", {}, `s${part.subspace} · width ${part.width}${count}`);
  const list = part.neighbors.length
    ? element("ol", {}, ...part.neighbors.map(neighbor))
    : element("p", { class: "soft small" }, "No activation is that near.");
  return element("section", { class: "card", "data-subspace": part.subspace }, heading, list);
}

function token(piece, answer, isText) {
  const chosen = piece.place === answer.place;
  if (piece.place === null) return element("span", piece.special ? { class: "special" } : {}, piece.text);
  const change = isText ? { token: piece.place } : { row: piece.place };
  return element(
    "button",
    { type: "button", class: "token", "aria-pressed": chosen ? "true" : "false", onclick: () => go(change) },
    piece.text,
  );
}

function draw(answer) {
  const isText = new URLSearchParams(location.search).has("text");
  at("tokens-title").hidden = false;
  at("tokens").replaceChildren(...answer.tokens.map((piece) => token(piece, answer, isText)));
  at("results").replaceChildren(...answer.subspaces.map(card));
}

// Ask for what the address says, and draw the answer.
async function show() {
  const state = new URLSearchParams(location.search);
  for (const name of FIELDS) if (state.has(name)) at(name).value = state.get(name);
  at("text").value = state.get("text") ?? "";
  drawSubspaces(state.get("subspaces") ? state.get("subspaces").split(",").map(Number) : null);
  complain("");
  if (!state.has("text") && !state.has("row")) return;
  const number = ++latest;
  const started = performance.now();
  at("status").textContent = "Searching …";
  try {
    const answer = await ask("api/query", state);
    if (number !== latest) return;
    draw(answer);
    const rows = siteNow().rows.toLocaleString("en");
    at("status").textContent = `${rows} activations searched in ${Math.round(performance.now() - started)} ms`;
  } catch (error) {
    if (number !== latest) return;
    at("tokens").replaceChildren();
    at("results").replaceChildren();
    at("tokens-title").hidden = true;
    at("status").textContent = "";
    complain(error.message);
  }
}

async function random() {
  try {
    const { row } = await ask("api/random", new URLSearchParams({ site: siteNow().name }));
    go({ row, text: null, token: null });
  } catch (error) {
    complain(error.message);
  }
}

function submit(event) {
  event.preventDefault();
  const text = at("text").value;
  if (!text.trim()) return complain("the text is empty: type some words");
  if (text.length > about.text_limit) {
    return complain(
      `the text has ${text.length} characters, at most ${about.text_limit} are taken: shorten it`);
  }
  return go({ text, row: null, token: null });
}

async function start() {
  try {
    about = await ask("api/about", "");
  } catch (error) {
    return complain(error.message);
  }
  at("site").replaceChildren(...about.sites.map((site) => element("option", {}, site.name)));
  at("metric").value = about.sites[0].metric;
  at("about").textContent = about.sites.map((site) => `${site.model}, ${site.name}: ${site.rows.toLocaleString("en")} activations`).join(" · ");
  at("form").addEventListener("submit", submit);
  at("random").addEventListener("click", random);
  at("site").addEventListener("change", () => {
    drawSubspaces(null);
    const isRow = new URLSearchParams(location.search).has("row"); // another site has other rows
    go(isRow ? { row: null, subspaces: null } : { subspaces: null });
  });
  for (const name of FIELDS.slice(1)) at(name).addEventListener("change", () => at("form").reportValidity() && go({}));
  at("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
  });
  addEventListener("popstate", show);
  return show();
}

start();
