// A small chart in SVG: two curves over the updates, each with an axis of its own in its colour.
export const CURVES = [
  { key: "distance", label: "distance", colour: "#4ea1ff", axis: "left" },
  { key: "variety", label: "variety, share of teacher's", colour: "#ffb74e", axis: "right" },
];
const HEIGHT = 120;
const ROOM = { left: 36, right: 36, top: 8, bottom: 26 };
const GREY = "rgba(160,160,160,.35)";

function svg(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// The least of 1, 2, 2.5, 5 times a power of ten that is not below a value.
function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999999);
}

const short = (value) => (value >= 10000 ? `${+(value / 1000).toPrecision(3)}k` : String(+value.toPrecision(3)));

export class Chart {
  constructor() {
    this.root = svg("svg", { class: "onestep-chart", height: HEIGHT });
    Object.assign(this.root.style, { flex: "none", width: "100%", height: `${HEIGHT}px`, background: "rgba(0,0,0,.25)" });
    this.clear();
    if (window.ResizeObserver) new ResizeObserver(() => this.draw()).observe(this.root);
  }

  clear() {
    this.points = Object.fromEntries(CURVES.map(({ key }) => [key, []]));
    this.total = 1;
    this.draw();
  }

  add(update, total, numbers) {
    this.total = Math.max(total, 1);
    for (const { key } of CURVES) if (Number.isFinite(numbers[key])) this.points[key].push([update, numbers[key]]);
    this.draw();
  }

  last(key) {
    return this.points[key].at(-1)?.[1];
  }

  draw() {
    const width = this.root.clientWidth || 320;
    const [right, bottom] = [width - ROOM.right, HEIGHT - ROOM.bottom];
    this.root.replaceChildren();
    this.root.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!CURVES.some(({ key }) => this.points[key].length)) return;
    const x = (update) => ROOM.left + ((right - ROOM.left) * update) / this.total;
    const y = (value, most) => bottom - ((bottom - ROOM.top) * value) / most;
    const write = (text, at, more) => this.root.append(svg("text", { "font-size": 9, fill: "#aaa", ...at, ...more }, text));
    for (const share of [0, 0.5, 1]) {
      const line = { x1: ROOM.left, x2: right, y1: y(share, 1), y2: y(share, 1), stroke: GREY };
      this.root.append(svg("line", line));
      const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
      write(short(Math.round(this.total * share)), { x: x(this.total * share), y: bottom + 10 }, { "text-anchor": anchor });
    }
    write("updates", { x: (ROOM.left + right) / 2, y: HEIGHT - 4 }, { "text-anchor": "middle" });
    for (const curve of CURVES) this.curve(curve, x, y, write, width);
  }

  curve({ key, colour, axis }, x, y, write, width) {
    const points = this.points[key];
    if (!points.length) return;
    const most = roundUp(Math.max(...points.map(([, value]) => value)));
    const at = axis === "left" ? { x: ROOM.left - 4, "text-anchor": "end" } : { x: width - ROOM.right + 4 };
    for (const share of [0, 0.5, 1]) write(short(most * share), { ...at, y: y(share, 1) + 3 }, { fill: colour });
    const places = points.map(([update, value]) => [x(update), y(value, most)]);
    // two measures are two measures, not yet a curve
    if (points.length > 2) {
      const line = { points: places.map((place) => place.join(",")).join(" "), fill: "none", stroke: colour };
      this.root.append(svg("polyline", { ...line, "stroke-width": 1.5 }));
    }
    for (const [cx, cy] of places.slice(-60)) this.root.append(svg("circle", { cx, cy, r: 2, fill: colour }));
  }
}
