"use strict";
// Curves over the steps of a run, drawn as SVG at the width there is. One page's charts share the
// steps that are shown, the step that is pointed at, and which curves are hidden.

const SVG = "http://www.w3.org/2000/svg";

const shared = { charts: [], zoom: null, hidden: new Set() };

function element(name, attributes, parent, text) {
  const made = name.startsWith("svg:")
    ? document.createElementNS(SVG, name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// -- numbers ----------------------------------------------------------------------------------

function formatted(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e7 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function linearTicks(low, high, most) {
  const rough = (high - low) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step || 0);
  return ticks;
}

function logTicks(low, high, most) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const spread = Math.ceil((last - first) / most);
  const factors = last - first <= 1 ? [1, 2, 3, 5, 7] : last - first <= 3 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let decade = first; decade <= last; decade += spread)
    for (const factor of factors) {
      const tick = factor * 10 ** decade;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  return ticks.length > 1 ? ticks : linearTicks(low, high, most);
}

// Where in the ascending `steps` the one nearest to `step` is.
function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  return Math.abs(steps[high] - step) < Math.abs(step - steps[low]) ? high : low;
}

// -- a chart ----------------------------------------------------------------------------------

class Chart {
  // `spec`: title, series of {name, label, colour, style, dash, x, y}, layers of stacked areas, isLog, height.
  constructor(figure, spec) {
    this.figure = figure;
    this.spec = spec;
    this.isLog = Boolean(spec.log);
    this.isWhole = false;
    this.all = [...(spec.layers || []), ...spec.series];
    this.bounds = this.steps();
    this.heading = element("figcaption", {}, figure);
    element("span", { class: "title" }, this.heading, spec.title);
    if (spec.note) element("span", { class: "note" }, this.heading, spec.note);
    if (spec.canBeLog) this.addSwitch("log", "Logarithmic axis", "isLog");
    if (spec.ceiling) this.addSwitch("spikes", `Show all of it, up to ${formatted(spec.highest)}`, "isWhole");
    if (this.all.length > 1 && spec.legend !== false) this.addLegend();
    this.plot = element("div", { class: "plot" }, figure);
    this.svg = element("svg:svg", { role: "img", tabindex: "0", "aria-label": this.summary() }, this.plot);
    this.readout = element("div", { class: "readout", hidden: "" }, this.plot);
    this.spoken = element("span", { class: "unseen", "aria-live": "polite" }, this.plot);
    this.listen();
  }

  steps() {
    let low = Infinity;
    let high = -Infinity;
    for (const { x } of this.all) {
      low = Math.min(low, x[0]);
      high = Math.max(high, x[x.length - 1]);
    }
    return [low, high];
  }

  summary() {
    const parts = this.all
      .slice(0, 8)
      .map(({ label, x, y }) => `${label} from ${formatted(y[0])} to ${formatted(y[y.length - 1])} at step ${x[x.length - 1]}`);
    return `${this.spec.title}: ${parts.join("; ")}. Arrow keys read the values.`;
  }

  addSwitch(name, title, property) {
    const state = { type: "button", class: "switch", "aria-pressed": this[property], title };
    const button = element("button", state, this.heading, name);
    button.onclick = () => {
      this[property] = !this[property];
      button.setAttribute("aria-pressed", this[property]);
      this.draw();
    };
  }

  addLegend() {
    const legend = element("div", { class: "legend" }, this.figure);
    for (const series of this.all) {
      if (series.style === "raw") continue;
      const shown = !shared.hidden.has(series.name);
      const button = element("button", { type: "button", class: series.colour, "aria-pressed": shown }, legend);
      button.dataset.series = series.name;
      const kind = this.spec.layers && this.spec.layers.includes(series) ? "area" : "line";
      element("i", { class: `key ${kind} ${series.dash || ""}` }, button);
      button.append(series.label);
      button.onclick = () => toggle(series.name);
    }
  }

  visible(list) {
    return (list || []).filter(({ name }) => !shared.hidden.has(name));
  }

  // -- scales ---------------------------------------------------------------------------------

  measure() {
    this.width = Math.max(240, this.plot.clientWidth || 640);
    this.height = this.spec.height || 200;
    this.xRange = shared.zoom || this.bounds;
    if (this.xRange[0] === this.xRange[1]) this.xRange = [this.xRange[0] - 1, this.xRange[1] + 1];
    this.stacked = stack(this.visible(this.spec.layers));
    this.yRange = this.valueRange();
    const most = Math.max(2, Math.floor(this.height / 38));
    this.yTicks = this.isLog ? logTicks(...this.yRange, most) : linearTicks(...this.yRange, most);
    const longest = Math.max(...this.yTicks.map((tick) => formatted(tick).length));
    this.left = 12 + 6.6 * longest;
    this.right = this.width - 10;
    this.top = 10;
    this.bottom = this.height - 26;
  }

  valueRange() {
    let low = Infinity;
    let high = -Infinity;
    const [first, last] = this.xRange;
    const take = (x, y, i) => {
      // The neighbours outside of what is shown count too: lines lead there.
      const isSeen = (x[i + 1] ?? x[i]) >= first && (x[i - 1] ?? x[i]) <= last;
      if (!isSeen || y[i] === null || (this.isLog && y[i] <= 0)) return;
      low = Math.min(low, y[i]);
      high = Math.max(high, y[i]);
    };
    for (const { x, y } of this.visible(this.spec.series)) for (let i = 0; i < x.length; i++) take(x, y, i);
    for (const { x, top } of this.stacked) for (let i = 0; i < x.length; i++) take(x, top, i);
    if (low > high) return this.isLog ? [0.1, 1] : [0, 1];
    if (this.spec.fromZero && !this.isLog) low = Math.min(0, low);
    if (this.spec.ceiling && !this.isWhole && !shared.zoom) high = Math.min(high, this.spec.ceiling);
    if (low === high) return this.isLog ? [low / 2, high * 2] : [low - Math.abs(low || 1) * 0.1, high + Math.abs(high || 1) * 0.1];
    if (this.isLog) return [low / 1.08, high * 1.08];
    const margin = (high - low) * 0.05;
    return [this.spec.fromZero && low === 0 ? 0 : low - margin, high + margin];
  }

  px(step) {
    return this.left + ((step - this.xRange[0]) / (this.xRange[1] - this.xRange[0])) * (this.right - this.left);
  }

  py(value) {
    let [low, high] = this.yRange;
    if (this.isLog) [low, high, value] = [Math.log(low), Math.log(high), Math.log(Math.max(value, low / 10))];
    return this.bottom - ((value - low) / (high - low)) * (this.bottom - this.top);
  }

  stepAt(clientX) {
    const box = this.svg.getBoundingClientRect();
    const x = ((clientX - box.left) / box.width) * this.width;
    const share = Math.min(1, Math.max(0, (x - this.left) / (this.right - this.left)));
    return this.xRange[0] + share * (this.xRange[1] - this.xRange[0]);
  }

  // -- drawing --------------------------------------------------------------------------------

  draw() {
    this.measure();
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.drawAxes();
    const clip = `clip-${shared.charts.indexOf(this)}`;
    const box = element("svg:clipPath", { id: clip }, element("svg:defs", {}, this.svg));
    element("svg:rect", { x: this.left - 4, y: 0, width: this.right - this.left + 8, height: this.bottom + 1 }, box);
    const curves = element("svg:g", { "clip-path": `url(#${clip})` }, this.svg);
    for (const layer of this.stacked) this.drawLayer(layer, curves);
    for (const series of this.visible(this.spec.series)) this.drawLine(series, curves);
    this.marks = element("svg:g", {}, this.svg);
  }

  drawAxes() {
    const grid = element("svg:g", { class: "grid" }, this.svg);
    for (const tick of this.yTicks) {
      const y = this.py(tick).toFixed(1);
      element("svg:line", { x1: this.left, x2: this.right, y1: y, y2: y }, grid);
      element("svg:text", { x: this.left - 8, y: Number(y) + 3.5, "text-anchor": "end" }, grid, formatted(tick));
    }
    element("svg:line", { class: "base", x1: this.left, x2: this.right, y1: this.bottom, y2: this.bottom }, grid);
    const ticks = linearTicks(...this.xRange, Math.max(2, Math.floor((this.right - this.left) / 66)));
    for (const tick of ticks.filter((tick) => Number.isInteger(tick) && tick >= 0)) {
      const x = this.px(tick);
      const anchor = x > this.right - 16 ? "end" : x < this.left + 8 ? "start" : "middle";
      element("svg:text", { x: x.toFixed(1), y: this.bottom + 18, "text-anchor": anchor }, grid, tick.toLocaleString("en"));
    }
  }

  drawLine(series, parent) {
    const { x, y, colour, style, name } = series;
    const points = series.ends ? this.outline(series, y) : [];
    for (let i = 0; i < x.length && !series.ends; i++)
      if (!this.isLog || y[i] > 0) points.push(`${this.px(x[i]).toFixed(2)} ${this.py(y[i]).toFixed(2)}`);
    const group = element("svg:g", { class: `${colour} ${style} ${series.dash || ""}` }, parent);
    group.dataset.series = name;
    element("svg:path", { class: "curve", d: points.length ? `M${points.join("L")}` : "" }, group);
    const hasDots = style !== "raw" && style !== "smooth" && (this.right - this.left) / points.length > 12;
    if (hasDots || points.length === 1)
      for (const point of points) {
        const [cx, cy] = point.split(" ");
        element("svg:circle", { class: "dot", cx, cy, r: 3 }, group);
      }
  }

  // A stretch of steps is as wide as what it stands for.
  outline({ x, ends }, values) {
    return x.flatMap((step, i) => {
      const y = this.py(values[i]).toFixed(2);
      return [`${this.px(step - 0.5).toFixed(2)} ${y}`, `${this.px(ends[i] + 0.5).toFixed(2)} ${y}`];
    });
  }

  drawLayer({ series, base, top }, parent) {
    const points = [...this.outline(series, top), ...this.outline(series, base).reverse()];
    const path = element("svg:path", { class: `layer ${series.colour}`, d: `M${points.join("L")}Z` }, parent);
    path.dataset.series = series.name;
  }

  // -- pointing -------------------------------------------------------------------------------

  listen() {
    let start = null;
    this.svg.addEventListener("pointerdown", (event) => {
      start = event.clientX;
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      const step = this.stepAt(event.clientX);
      pointAt(step, this);
      if (start !== null && Math.abs(event.clientX - start) > 6) this.markRange(this.stepAt(start), step);
    });
    this.svg.addEventListener("pointerup", (event) => {
      const isDragged = start !== null && Math.abs(event.clientX - start) > 12;
      if (isDragged) zoomTo([this.stepAt(start), this.stepAt(event.clientX)].sort((a, b) => a - b));
      start = null;
    });
    this.svg.addEventListener("pointercancel", () => (start = null));
    this.svg.addEventListener("pointerleave", () => pointAt(null, this));
    this.svg.addEventListener("dblclick", () => zoomTo(null));
    this.svg.addEventListener("blur", () => pointAt(null, this));
    this.svg.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const longest = this.all.reduce((most, series) => (series.x.length > most.x.length ? series : most));
    const last = longest.x.length - 1;
    const at = this.pointed === undefined || this.pointed === null ? last : nearest(longest.x, this.pointed);
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - 20, PageDown: at + 20, Home: 0, End: last };
    if (event.key === "Escape") zoomTo(null);
    if (!(event.key in moves)) return;
    event.preventDefault();
    pointAt(longest.x[Math.min(last, Math.max(0, moves[event.key]))], this);
    this.spoken.textContent = this.readout.innerText.replaceAll("\n", " ");
  }

  markRange(from, to) {
    const [x1, x2] = [this.px(from), this.px(to)].sort((a, b) => a - b);
    const area = { class: "range", x: x1, y: this.top, width: x2 - x1, height: this.bottom - this.top };
    element("svg:rect", area, this.marks);
  }

  // Marks the values nearest to a step; the chart that is pointed at spells them out.
  point(step, isActive) {
    this.pointed = step;
    this.marks.replaceChildren();
    this.readout.hidden = true;
    if (step === null || step < this.xRange[0] || step > this.xRange[1]) return;
    const found = this.found(step);
    if (!found.length) return;
    const at = found.reduce((best, one) => (Math.abs(one.step - step) < Math.abs(best.step - step) ? one : best)).step;
    const x = this.px(at);
    element("svg:line", { class: "cursor", x1: x, x2: x, y1: this.top, y2: this.bottom }, this.marks);
    for (const { series, step: own, height } of found)
      if (own === at && !(this.isLog && height <= 0))
        element("svg:circle", { class: `at ${series.colour}`, cx: x, cy: this.py(height), r: 3.5 }, this.marks);
    if (isActive) this.spellOut(at, found, x);
  }

  found(step) {
    const found = this.visible(this.spec.series).map((series) => {
      const i = nearest(series.x, step);
      return { series, step: series.x[i], end: (series.ends || series.x)[i], value: series.y[i], height: series.y[i] };
    });
    const layers = this.stacked.map(({ series, x, ends, top }) => {
      const i = nearest(x, step);
      return { series, step: x[i], end: ends[i], value: series.y[i], height: top[i] };
    });
    return [...layers, ...found];
  }

  spellOut(at, found, x) {
    this.readout.replaceChildren();
    const { end } = found.find(({ step }) => step === at);
    const name = end > at ? `steps ${at.toLocaleString("en")} to ${end.toLocaleString("en")}` : `step ${at.toLocaleString("en")}`;
    element("b", {}, this.readout, name);
    const list = element("dl", {}, this.readout);
    for (const { series, step, value } of found.slice(0, 16)) {
      const term = element("dt", { class: series.colour }, list);
      element("i", { class: `key line ${series.dash || ""}` }, term);
      term.append(series.label);
      const where = step === at ? "" : ` at ${step.toLocaleString("en")}`;
      element("dd", {}, list, formatted(value) + (series.unit || "") + where);
    }
    this.readout.hidden = false;
    const scale = this.plot.clientWidth / this.width;
    const width = this.readout.offsetWidth;
    const right = x * scale + 14;
    const left = x * scale - width - 14;
    const place = right + width <= this.plot.clientWidth ? right : Math.max(0, left);
    this.readout.style.left = `${place}px`;
  }
}

// Each layer with the heights that it reaches from and to. All have the same steps.
function stack(layers) {
  let base = null;
  return layers.map((series) => {
    const from = base || series.y.map(() => 0);
    const top = series.y.map((value, i) => from[i] + value);
    base = top;
    return { series, x: series.x, ends: series.ends, base: from, top };
  });
}

// -- what the charts of a page share --------------------------------------------------------------

function pointAt(step, active) {
  for (const chart of shared.charts) chart.point(step, chart === active);
}

function zoomTo(range) {
  shared.zoom = range && range[1] - range[0] >= 1 ? range : null;
  for (const button of document.querySelectorAll(".all-steps")) button.hidden = shared.zoom === null;
  for (const chart of shared.charts) chart.draw();
}

function toggle(name) {
  if (!shared.hidden.delete(name)) shared.hidden.add(name);
  for (const button of document.querySelectorAll("[data-series][aria-pressed]"))
    button.setAttribute("aria-pressed", !shared.hidden.has(button.dataset.series));
  for (const chart of shared.charts) chart.draw();
}

function drawCharts(specs) {
  for (const figure of document.querySelectorAll("figure[data-chart]"))
    shared.charts.push(new Chart(figure, specs[figure.dataset.chart]));
  for (const chart of shared.charts) chart.draw();
  for (const button of document.querySelectorAll(".all-steps")) button.onclick = () => zoomTo(null);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    for (const chart of shared.charts) chart.draw();
  });
  // On paper columns are as wide as the paper has them.
  matchMedia("print").addEventListener("change", () => shared.charts.forEach((chart) => chart.draw()));
}
