// What a trainer's node shows: what is being done, how far it is, a chart, the pictures, and three buttons.
import { api } from "../../../scripts/api.js";
import { Chart, CURVES } from "./chart.js";

const IDLE = "Not running. Press Run: progress, a chart and pictures appear here.";
const BUTTONS = [
  ["finish", "Finish", "End after the current update and keep the result", "finishing after this update ..."],
  ["sample", "Sample now", "Draw new pictures after the current update", "pictures come after this update ..."],
  ["save", "Save now", "Save the run's state after the current update", "the state is saved after this update ..."],
];

// What a preview's rows are, by method; a LoRA's are the same for all.
const ROWS = {
  nct: "from above: controls, without them, with them",
  sun: "from above: without a negative, as it asks, with it",
};

export function element(tag, style = {}, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.style, style);
  return made;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const count = (number) => Number(number).toLocaleString("en-US");

export class Panel {
  // method: gives the name of the one that the node trains by
  constructor(method) {
    this.method = method;
    this.root = element("div", {
      display: "flex", flexDirection: "column", gap: "4px", width: "100%", height: "100%", boxSizing: "border-box",
      padding: "4px", fontSize: "12px", color: "var(--input-text, #ddd)", overflow: "hidden",
    }, { className: "onestep-panel" });
    this.status = element("div", { flex: "none", whiteSpace: "pre-line", maxHeight: "84px", overflow: "auto", userSelect: "text" },
      { className: "onestep-status" });
    this.track = element("div", { flex: "none", height: "6px", background: "rgba(128,128,128,.3)", borderRadius: "3px" });
    this.bar = element("div", { height: "100%", width: "0", background: "#4ea1ff", borderRadius: "3px" }, { className: "onestep-bar" });
    this.track.append(this.bar);
    this.chart = new Chart();
    this.legend = element("div", { flex: "none", display: "flex", gap: "10px", flexWrap: "wrap", fontSize: "11px" });
    this.picture = element("img", { flex: "1 1 0", minHeight: "60px", width: "100%", objectFit: "contain", display: "none",
      imageRendering: "pixelated" }, { className: "onestep-preview", alt: "what is to be learnt, above the student" });
    this.caption = element("div", { flex: "none", fontSize: "11px", opacity: 0.75, display: "none" }, { className: "onestep-caption" });
    this.buttons = Object.fromEntries(BUTTONS.map((row) => [row[0], this.button(...row)]));
    const line = element("div", { flex: "none", display: "flex", gap: "4px" });
    line.append(...Object.values(this.buttons));
    // the buttons before what grows: a node that is made small cuts its end off
    this.root.append(this.status, this.track, line, this.chart.root, this.legend, this.picture, this.caption);
    this.rest(IDLE);
    this.begin("");
  }

  button(word, label, title, answer) {
    const made = element("button", { flex: "1", padding: "3px", cursor: "pointer", border: "1px solid rgba(128,128,128,.6)", borderRadius: "4px" },
      { className: `onestep-${word}`, textContent: label, title, disabled: true });
    made.addEventListener("click", () => this.ask(word, made, answer));
    return made;
  }

  begin(name) {
    this.name = name;
    this.last = -1;
    this.chart.clear();
    this.tell();
  }

  // A node has been queued or is being executed, and its run has said nothing yet.
  wait(words) {
    this.say(words);
    this.fill(0);
  }

  show(told) {
    if (told.name !== this.name || told.update < this.last) this.begin(told.name);
    this.last = told.update;
    this.chart.add(told.update, told.total, told.numbers);
    this.say(this.line(told));
    this.status.title = told.notes.join("\n");
    this.fill(told.of ? told.done / told.of : 0);
    if (told.preview) this.see(told.preview, told.update);
    for (const made of Object.values(this.buttons)) made.disabled = false;
    this.tell();
  }

  line(told) {
    const far = told.of > 1 ? `: ${count(told.done)} of ${count(told.of)}` : "";
    const left = Number.isFinite(told.eta) && told.eta !== null ? `${duration(told.eta)} to go` : "measuring how long it takes";
    const idle = told.numbers.no_gain > 0 ? `; no gain for ${count(told.numbers.no_gain)} updates` : "";
    return `${told.phase}${far}; ${left}${idle}`;
  }

  say(words, failed = false) {
    this.status.textContent = words;
    this.status.style.color = failed ? "#ff7a7a" : "";
  }

  fill(share) {
    this.bar.style.width = `${Math.round(100 * Math.min(1, Math.max(0, share)))}%`;
  }

  see(file, update) {
    this.picture.src = api.apiURL(`/view?${new URLSearchParams({ ...file, t: Date.now() })}`);
    this.picture.style.display = "";
    this.caption.style.display = "";
    const rows = ROWS[this.method()] ?? "above the teacher, below the student";
    this.caption.textContent = `${rows}${update === undefined ? "" : `, after ${count(update)} updates`}`;
  }

  tell() {
    const known = CURVES.filter(({ key }) => this.chart.last(key) !== undefined);
    this.legend.replaceChildren(...known.map(({ key, label, colour }) =>
      element("span", { color: colour }, { textContent: `${label} ${+this.chart.last(key).toPrecision(3)}` })));
  }

  async ask(word, made, answer) {
    made.disabled = true;
    const heard = await api.fetchApi(`/onestep/${word}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ name: this.name }),
    });
    this.say(heard.ok ? answer : "this run is over already");
  }

  // The end of a run, in words.
  rest(words, failed = false) {
    for (const made of Object.values(this.buttons)) made.disabled = true;
    if (words) this.say(words, failed);
    if (failed) this.fill(0);
  }
}
