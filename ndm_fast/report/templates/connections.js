// The server draws every edge; this hides what is below the threshold, and tells of the edge that is clicked.
"use strict";

const at = (id) => document.getElementById(id);
const lines = [...document.querySelectorAll(".cx path.cx-edge[data-strength]")];
const MOST = 12; // prompts of an edge
let found = null;

// Text enters the page only here, never as markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function show() {
  const least = Number(at("threshold").value) / 100;
  const way = at("way") ? at("way").value : "weights";
  const heads = new Set();
  let count = 0;
  for (const line of lines) {
    const seen = line.dataset.way === way && Number(line.dataset.strength) >= least && line.dataset.edge;
    line.toggleAttribute("hidden", !seen);
    if (!seen) continue;
    count += 1;
    heads.add(`${line.dataset.pair} ${line.dataset.head}`);
  }
  for (const line of lines) {
    if (line.dataset.edge) continue; // what a head writes is seen with what it reads
    const seen = line.dataset.way === way && Number(line.dataset.strength) >= least
      && heads.has(`${line.dataset.pair} ${line.dataset.head}`);
    line.toggleAttribute("hidden", !seen);
  }
  for (const head of document.querySelectorAll(".cx-head")) {
    const seen = heads.has(`${head.dataset.pair} ${head.dataset.head}`);
    head.querySelector("text").toggleAttribute("hidden", !seen);
  }
  at("shown").value = `${at("threshold").value} % of the strongest, ${count} edges`;
}

function fact(name, value) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value));
}

function prompts(edge, tested) {
  if (!edge.by_prompt) return [element("p", { class: "soft small" }, "Effects on single prompts are kept of the strongest edges only.")];
  const order = edge.by_prompt.map((_, n) => n).sort((a, b) => Math.abs(edge.by_prompt[b]) - Math.abs(edge.by_prompt[a]));
  const rows = order.slice(0, MOST).map((n) =>
    element("li", {}, element("span", { class: "distance" }, edge.by_prompt[n].toFixed(3)), element("span", { class: "text" }, tested.texts[n])));
  return [element("p", { class: "soft small" }, "Prompts on which it carries most, with the drop of the metric:"), element("ol", {}, ...rows)];
}

function intoMlp(pair, s, block) {
  const mlp = pair.mlps.find((one) => one.block === block);
  const edge = { share: mlp.read[s], times: mlp.times[s], deviations: mlp.deviations[s] };
  if (!mlp.effects) return edge;
  Object.assign(edge, { effect: mlp.effects[s], error: mlp.errors[s], attributed: mlp.attributed[s] });
  edge.by_prompt = mlp.by_prompt[s];
  return edge;
}

function tell(line) {
  const pair = found.pairs[Number(line.dataset.pair)];
  const [subspace, block, head, side] = line.dataset.edge.split(".");
  const edge = head === "mlp" ? intoMlp(pair, Number(subspace), Number(block))
    : pair.edges.find((one) => one.subspace === Number(subspace) && one.block === Number(block)
      && one.head === Number(head) && one.side === side);
  const facts = [
    fact("share of what it reads", `${(100 * edge.share).toFixed(1)} %`),
    fact("over chance", edge.times.toFixed(2)),
    fact("deviations from chance", edge.deviations.toFixed(1)),
  ];
  if (pair.tested) {
    facts.push(fact(`effect, test ${pair.tested.test}`, `${edge.effect.toFixed(3)} ± ${edge.error.toFixed(3)}`));
    facts.push(fact("to first order", edge.attributed.toFixed(3)));
    facts.push(fact("whole activation", pair.tested.whole.toFixed(3)));
  }
  const into = head === "mlp" ? `the MLP of block ${block}` : `head ${block}.${head}, ${side}`;
  const title = `${found.sites[pair.below].site} s${subspace} to ${into}`;
  at("edge").replaceChildren(element("h3", {}, title), element("dl", { class: "facts" }, ...facts),
    ...(pair.tested ? prompts(edge, pair.tested) : []));
}

function choose(event) {
  const line = event.target.closest("path.cx-edge[data-edge]");
  if (!line || !found) return;
  for (const other of lines) other.classList.toggle("cx-chosen", other === line);
  tell(line);
}

async function start() {
  at("threshold").addEventListener("input", show);
  if (at("way")) at("way").addEventListener("change", show);
  at("picture").addEventListener("click", choose);
  at("picture").addEventListener("keydown", (event) => event.key === "Enter" && choose(event));
  show();
  const answer = await fetch("api/connections");
  const content = await answer.json();
  if (answer.ok) found = content;
  else at("edge").replaceChildren(content.error);
}

start();
