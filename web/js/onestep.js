// The browser part: a panel in the trainers, a line of text in the loaders, errors in words.
// DOM widgets alone: they show in LiteGraph and in Nodes 2.0.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { Panel, element } from "./panel.js";

const TRAINERS = ["OneStepDistil", "OneStepTrainAdapter"];
const FOLDED = [...TRAINERS, "OneStepPlan"];
const TALKERS = ["OneStepLoadLoRA", "OneStepPromptList", "OneStepExtract", "OneStepPlan", "OneStepDoctor", ...TRAINERS];
const TEXT_WIDTH = 280; // in pixels, of a node that has something to say
const CANCELLED = "cancelled: what was learnt is saved; Run goes on from there";
const panels = new Map(); // node -> panel
let trained = new Set(); // panels that the graph under way has reached

// A node inside a subgraph is called "5:3": its own number is the last.
function panelOf(id) {
  const path = String(id).split(":");
  for (const [node, panel] of panels) {
    const inside = node.graph !== undefined && node.graph !== (app.rootGraph ?? app.graph);
    if (String(node.id) === path.at(-1) && inside === path.length > 1) return panel;
  }
  return null;
}

function say(node, text) {
  let widget = node.widgets?.find((one) => one.name === "onestep_says");
  if (!widget) {
    const box = element("div", { whiteSpace: "pre-wrap", fontSize: "12px", padding: "4px", overflow: "auto",
      color: "var(--input-text, #ddd)" }, { className: "onestep-says" });
    widget = node.addDOMWidget("onestep_says", "onestep_says", box, { serialize: false, getMinHeight: () => 60 });
  }
  widget.element.textContent = text;
}

// ComfyUI's own notice says that a node failed, and hides why two clicks away: the sentence is worth a notice, below it.
const STYLE = `
  .p-toast:has(.onestep-notice) { margin-top: 146px; }
  .onestep-notice { background: #3b1a1c !important; backdrop-filter: none !important; }
  .onestep-notice .p-toast-detail { white-space: pre-line; user-select: text; overflow-wrap: anywhere; }`;

function notice(detail) {
  const summary = app.graph?.getNodeById?.(detail.node_id)?.title || detail.node_type;
  const words = { severity: "error", summary, detail: detail.exception_message.trim(), life: 30000 };
  app.extensionManager?.toast?.add({ ...words, styleClass: "onestep-notice" });
}

// The server refuses a graph as it is queued, before anything runs; the page has no event for that.
function watchQueue() {
  let round = 0;
  api.addEventListener("promptQueued", () => round++);
  api.addEventListener("promptQueueing", () => {
    const mine = ++round;
    const told = new Set();
    const look = (left) => {
      for (const [id, { class_type: type, errors }] of Object.entries(app.extensionManager?.lastNodeErrors ?? {}))
        for (const sentence of type.startsWith("OneStep") ? sentences(errors) : [])
          if (!told.has(id + sentence)) {
            told.add(id + sentence);
            notice({ node_id: id, node_type: type, exception_message: sentence });
            panelOf(id)?.rest(sentence, true);
          }
      if (!told.size && mine === round && left) setTimeout(look, 200, left - 1);
    };
    setTimeout(look, 200, 150);
  });
}

// One sentence, which ComfyUI repeats for each input that was looked at.
function sentences(errors) {
  const found = errors.filter(({ type }) => type === "custom_validation_failed").map(({ details }) => details);
  return [...new Set(found.map((text) => text.replace(/^\w+ - /, "")))];
}

function listen() {
  document.head.append(element("style", {}, { textContent: STYLE }));
  watchQueue();
  api.addEventListener("execution_start", () => {
    trained = new Set();
    for (const panel of panels.values()) panel.wait("waiting for the nodes before it ...");
  });
  api.addEventListener("executing", ({ detail }) => {
    const panel = panelOf(detail?.node ?? detail);
    if (panel) trained.add(panel);
    panel?.wait("starting ...");
  });
  api.addEventListener("onestep.progress", ({ detail }) => panelOf(detail.node)?.show(detail));
  api.addEventListener("execution_error", ({ detail }) => {
    if (String(detail.node_type).startsWith("OneStep")) notice(detail);
    leave(panelOf(detail.node_id), detail.exception_message?.trim(), true);
  });
  api.addEventListener("execution_interrupted", ({ detail }) => leave(panelOf(detail.node_id), CANCELLED, false));
  api.addEventListener("execution_success", () => leave(null, "", false));
}

// The graph has ended, at one panel's node with these words.
function leave(stopped, words, failed) {
  for (const panel of panels.values()) {
    if (panel === stopped) panel.rest(words, failed);
    else panel.rest(trained.has(panel) ? "" : "not running");
  }
}

// Nodes 2.0 folds advanced widgets by itself; on the canvas of LiteGraph this button does.
function fold(node) {
  const button = node.addWidget("button", "all settings", null, () => show(!all));
  Object.assign(button, { serialize: false });
  Object.assign(button.options, { canvasOnly: true, serialize: false });
  const linked = (widget) => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
  let all;
  const show = (wanted) => {
    all = wanted;
    button.label = all ? "fewer settings" : "all settings ...";
    for (const widget of node.widgets) if (widget.options?.advanced) widget.hidden = !all && !linked(widget);
    node.setSize?.([node.size[0], node.computeSize()[1]]);
    app.canvas?.setDirty(true, true);
  };
  show(!!app.extensionManager?.setting?.get("Comfy.Node.AlwaysShowAdvancedWidgets"));
}

function addPanel(node) {
  const panel = new Panel(() => node.widgets?.find((widget) => widget.name === "method")?.value);
  panels.set(node, panel);
  const widget = node.addDOMWidget("onestep_watch", "onestep_watch", panel.root, { serialize: false, getMinHeight: () => 420 });
  widget.serialize = false;
  const removed = node.onRemoved;
  node.onRemoved = function () {
    panels.delete(node);
    return removed?.apply(this, arguments);
  };
  node.setSize?.([Math.max(node.size[0], 400), Math.max(node.size[1], node.computeSize?.()[1] ?? 0)]);
}

app.registerExtension({
  name: "OneStep",
  setup: listen,
  nodeCreated(node) {
    if (TALKERS.includes(node.comfyClass) && node.size[0] < TEXT_WIDTH) node.setSize([TEXT_WIDTH, node.size[1]]);
    if (FOLDED.includes(node.comfyClass)) fold(node);
    if (TRAINERS.includes(node.comfyClass)) addPanel(node);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!TALKERS.includes(nodeData.name)) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      const answer = before?.apply(this, arguments);
      const text = output?.text?.join?.("\n");
      const panel = panels.get(this);
      if (text && panel) panel.rest(text);
      else if (text) say(this, text);
      const picture = output?.onestep_preview?.[0];
      if (picture && panel) panel.see(picture);
      return answer;
    };
  },
});
