// The browser part: a live chart with preview and `Finish now` in Distil One-Step LoRA, and a line of text in the loaders.
// DOM widgets alone: they show in LiteGraph and in Nodes 2.0.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const DISTIL = "OneStepDistil";
const TALKERS = ["OneStepLoadLoRA", "OneStepPromptList", DISTIL];
const CURVES = [
  { key: "distance", label: "distance to teacher", colour: "#4ea1ff" },
  { key: "variety", label: "variety / teacher's", colour: "#ffb74e" },
];
const panels = new Map(); // node -> panel

function element(tag, style = {}, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.style, style);
  return made;
}

function svg(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "?";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

class Panel {
  constructor() {
    this.root = element("div", {
      display: "flex", flexDirection: "column", gap: "4px", width: "100%", height: "100%", boxSizing: "border-box",
      padding: "4px", fontSize: "11px", color: "var(--input-text, #ddd)", overflow: "hidden",
    }, { className: "onestep-panel" });
    this.status = element("div", { flex: "none" }, { className: "onestep-status", textContent: "not running" });
    this.chart = svg("svg", { viewBox: "0 0 300 110", preserveAspectRatio: "none", class: "onestep-chart" });
    Object.assign(this.chart.style, { flex: "none", width: "100%", height: "110px", background: "rgba(0,0,0,.25)" });
    this.legend = element("div", { flex: "none", display: "flex", gap: "10px", flexWrap: "wrap" });
    this.picture = element("img", { flex: "1 1 0", minHeight: "60px", width: "100%", objectFit: "contain", display: "none" },
      { className: "onestep-preview", alt: "teacher above student" });
    this.button = element("button", { flex: "none", padding: "3px", cursor: "pointer" },
      { className: "onestep-finish", textContent: "Finish now", disabled: true, title: "End after the current step and keep the result" });
    this.button.addEventListener("click", () => this.finish());
    this.root.append(this.status, this.chart, this.legend, this.picture, this.button);
    this.begin("");
  }

  begin(name) {
    this.name = name;
    this.points = Object.fromEntries(CURVES.map(({ key }) => [key, []]));
    this.draw();
  }

  show(told) {
    if (told.name !== this.name || told.update <= this.last) this.begin(told.name);
    this.last = told.update;
    this.total = told.total;
    for (const { key } of CURVES) if (key in told.numbers) this.points[key].push([told.update, told.numbers[key]]);
    const idle = told.numbers.no_gain > 0 ? `, no gain for ${told.numbers.no_gain} updates` : "";
    this.status.textContent = `${told.phase}: ${told.update} of ${told.total}, ${duration(told.eta)} to go${idle}`;
    if (told.notes.length) this.status.title = told.notes.join("\n");
    if (told.preview) this.see(told.preview);
    this.button.disabled = false;
    this.draw();
  }

  see(file) {
    this.picture.src = api.apiURL(`/view?${new URLSearchParams({ ...file, t: Date.now() })}`);
    this.picture.style.display = "";
  }

  draw() {
    this.chart.replaceChildren();
    this.legend.replaceChildren();
    for (const { key, label, colour } of CURVES) {
      const points = this.points[key];
      const last = points.length ? points[points.length - 1][1].toPrecision(3) : "-";
      this.legend.append(element("span", { color: colour }, { textContent: `${label} ${last}` }));
      if (!points.length) continue;
      const high = Math.max(...points.map(([, value]) => value)) || 1;
      const place = ([update, value]) => `${(300 * update) / this.total},${106 - (100 * value) / high}`;
      const line = svg("polyline", { points: points.map(place).join(" "), fill: "none", stroke: colour,
        "stroke-width": 2, "vector-effect": "non-scaling-stroke" });
      this.chart.append(line);
      for (const point of points.slice(-60)) {
        const [cx, cy] = place(point).split(",");
        this.chart.append(svg("circle", { cx, cy, r: 2, fill: colour }));
      }
    }
  }

  async finish() {
    this.button.disabled = true;
    const answer = await api.fetchApi("/onestep/finish", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ name: this.name }),
    });
    this.status.textContent = answer.ok ? "finishing after this step ..." : "this run is over already";
  }

  end(word) {
    if (this.button.disabled && !this.name) return;
    this.button.disabled = true;
    if (word) this.status.textContent = word;
  }
}

function panelOf(id) {
  // A node inside a subgraph is called "5:3": its own number is the last.
  const own = String(id).split(":").pop();
  for (const [node, panel] of panels) if (String(node.id) === own) return panel;
  return null;
}

function say(node, text) {
  let widget = node.widgets?.find((one) => one.name === "onestep_says");
  if (!widget) {
    const box = element("div", { whiteSpace: "pre-wrap", fontSize: "11px", padding: "4px", overflow: "auto",
      color: "var(--input-text, #ddd)" }, { className: "onestep-says" });
    widget = node.addDOMWidget("onestep_says", "onestep_says", box, { serialize: false, getMinHeight: () => 60 });
  }
  widget.element.textContent = text;
}

app.registerExtension({
  name: "OneStep",
  setup() {
    api.addEventListener("onestep.progress", ({ detail }) => panelOf(detail.node)?.show(detail));
    const words = { execution_error: "failed", execution_interrupted: "cancelled: what was learnt is saved", execution_success: "" };
    for (const [event, word] of Object.entries(words))
      api.addEventListener(event, ({ detail }) => {
        for (const [node, panel] of panels)
          if (!word || String(detail.node_id).split(":").pop() === String(node.id)) panel.end(word);
      });
  },
  nodeCreated(node) {
    if (node.comfyClass !== DISTIL) return;
    const panel = new Panel();
    panels.set(node, panel);
    const widget = node.addDOMWidget("onestep_watch", "onestep_watch", panel.root, { serialize: false, getMinHeight: () => 300 });
    widget.serialize = false;
    const removed = node.onRemoved;
    node.onRemoved = function () {
      panels.delete(node);
      return removed?.apply(this, arguments);
    };
    node.setSize?.([Math.max(node.size[0], 380), Math.max(node.size[1], node.computeSize?.()[1] ?? 0)]);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!TALKERS.includes(nodeData.name)) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      const answer = before?.apply(this, arguments);
      const text = output?.text?.join?.("\n");
      const panel = panels.get(this);
      if (text && panel) panel.end(text);
      else if (text) say(this, text);
      const picture = output?.onestep_preview?.[0];
      if (picture && panel) panel.see(picture);
      return answer;
    };
  },
});
