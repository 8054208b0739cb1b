"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = document.getElementById("svg-namespace").namespaceURI;
  const state = { axis: "steps", log: false, smooth: 0.8, hidden: new Set() };
  const axisName = { steps: "step", images: "images", flops: "model FLOPs" };
  const superscript = (n) => String(n).replace(/[-0-9]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);

  // Numbers as text. A tick gets as many digits as its neighbours need to differ.
  const plain = (v, step) => {
    const size = Math.abs(v);
    if (v === 0) return "0";
    if (size >= (step ? 1e15 : 1e10) || (step ? step < 1e-5 : size < 1e-3)) {
      const power = Math.floor(Math.log10(size) + 1e-9);
      const digits = step ? Math.max(0, Math.min(3, power - Math.floor(Math.log10(step) + 1e-9))) : 3;
      return `${(v / 10 ** power).toFixed(digits)}×10${superscript(power)}`;
    }
    for (const [scale, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (step && size >= scale && size >= 1e5) return `${+(v / scale).toPrecision(4)}${letter}`;
    }
    if (step) {
      let digits = 0;
      while (digits < 7 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits++;
      return v.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    }
    return size >= 1000 ? Math.round(v).toLocaleString("en-US") : String(+v.toPrecision(4));
  };

  const niceTicks = (low, high, count, whole) => {
    const rough = Math.max((high - low) / Math.max(1, count), whole ? 1 : 0);
    const base = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * base).find((s) => s >= rough * 0.999 && (!whole || Number.isInteger(s)));
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
    return { ticks, step };
  };
  const logTicks = (low, high) => {
    for (const marks of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
      const ticks = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
        for (const mark of marks) {
          const tick = +(mark * 10 ** power).toPrecision(3);
          if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
        }
      }
      if (ticks.length >= 4 || marks.length === 7) return { ticks, step: undefined };
    }
  };

  // A step as images or FLOPs: between the knots of the committed ledger, and on at its mean pace behind the last one.
  const onAxis = (run, step) => {
    if (state.axis === "steps") return step;
    const { steps } = data.runs[run], knots = data.runs[run][state.axis], last = steps.length - 1;
    if (last < 1) return null;
    if (step >= steps[last]) return (knots[last] * step) / steps[last];
    let low = 0, high = last;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return knots[low] + ((knots[high] - knots[low]) * (step - steps[low])) / (steps[high] - steps[low]);
  };

  // Exponential mean without the pull towards a start value; a group of averaged neighbours counts as its size.
  const smoothed = (values, weight, group) => {
    const keep = weight ** group;
    let mean = 0, mass = 0;
    return values.map((v) => {
      if (v === null) return null;
      mean = keep * mean + (1 - keep) * v;
      mass = keep * mass + (1 - keep);
      return mean / mass;
    });
  };
  const quantile = (sorted, q) => sorted[Math.round(q * (sorted.length - 1))];
  const element = (name, attributes, parent) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (parent) parent.append(node);
    return node;
  };
  const span = (parent, tag, text, className) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.textContent = text;
    parent.append(node);
    return node;
  };

  class Chart {
    constructor(figure) {
      this.id = figure.dataset.chart;
      this.plot = figure.querySelector(".plot");
      this.title = figure.querySelector("figcaption").textContent.trim();
      this.is = (option) => figure.classList.contains(option);
      this.width = 0;
      new ResizeObserver(() => { if (this.plot.clientWidth !== this.width) this.draw(); }).observe(this.plot);
    }

    lines() {
      const own = this.is("bins");
      const series = data.charts[this.id].filter((s) => !state.hidden.has(s.run));
      return series.map((s, index) => {
        const x = own ? s.x : s.x.map((step) => onAxis(s.run, step));
        const smooth = this.is("smooth") && s.y.length > 8;
        const y = smooth ? smoothed(s.y, state.smooth, s.group) : s.y;
        const newest = !series.slice(index + 1).some((other) => other.run === s.run);
        return { ...s, x, y, raw: smooth && state.smooth > 0 ? s.y : null, strong: !own || newest };
      }).filter((s) => s.x.every((v) => v !== null));
    }

    range(lines, log) {
      const main = lines.flatMap((l) => l.y).filter((v) => v !== null && (!log || v > 0));
      const raw = lines.flatMap((l) => l.raw || []).filter((v) => v !== null && (!log || v > 0)).sort((a, b) => a - b);
      const all = raw.length ? [...main, quantile(raw, 0.005), quantile(raw, 0.995)] : main;
      if (!all.length) return null;
      let low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
      if (log) return low === high ? [low / 2, high * 2] : [low / 1.06, high * 1.06];
      if (this.is("zero") || this.is("percent")) low = Math.min(0, low);
      if (low === high) { const pad = Math.abs(low) || 1; return [this.is("zero") ? Math.min(0, low) : low - pad / 2, high + pad / 2]; }
      if (this.id === "scores") return [0, 100];
      const pad = (high - low) * 0.05;
      return [low === 0 ? 0 : low - pad, high + pad];
    }

    draw() {
      const width = (this.width = this.plot.clientWidth), height = this.plot.clientHeight;
      this.plot.replaceChildren();
      this.lineSet = null;
      if (!width) return;
      const log = state.log && this.is("log"), lines = this.lines(), range = lines.length ? this.range(lines, log) : null;
      if (!range) {
        span(this.plot, "div", "nothing to show on this axis", "empty");
        return;
      }
      const xs = lines.flatMap((l) => [l.x[0], l.x[l.x.length - 1]]);
      let left = this.is("bins") ? Math.min(...lines.map((l) => l.edges[0])) : 0;
      let right = this.is("bins") ? Math.max(...lines.map((l) => l.edges[l.edges.length - 1])) : Math.max(...xs);
      if (left === right) right = left + 1;
      const [low, high] = range;
      const yTicks = log ? logTicks(low, high) : niceTicks(low, high, height / 48);
      const labels = yTicks.ticks.map((t) => plain(t, yTicks.step || (log ? 0 : 1)));
      const box = { left: 14 + 6.6 * Math.max(...labels.map((l) => l.length)), right: width - 12, top: 8, bottom: height - 38 };
      const px = (v) => box.left + ((v - left) / (right - left)) * (box.right - box.left);
      const f = log ? Math.log : (v) => v;
      const py = (v) => box.bottom - ((f(v) - f(low)) / (f(high) - f(low))) * (box.bottom - box.top);

      const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": `${this.title}, ${lines.length} curves` }, this.plot);
      yTicks.ticks.forEach((tick, i) => {
        element("line", { x1: box.left, x2: box.right, y1: py(tick), y2: py(tick), class: "grid" }, svg);
        element("text", { x: box.left - 8, y: py(tick) + 4, "text-anchor": "end" }, svg).textContent = labels[i];
      });
      element("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" }, svg);
      const xTicks = niceTicks(left, right, (box.right - box.left) / 84, !this.is("bins"));
      for (const tick of xTicks.ticks) {
        const x = px(tick), near = x > box.right - 16;
        element("line", { x1: x, x2: x, y1: box.bottom, y2: box.bottom + 4, class: "grid" }, svg);
        element("text", { x: near ? box.right + 8 : x, y: box.bottom + 17, "text-anchor": near ? "end" : "middle" }, svg).textContent = plain(tick, xTicks.step);
      }
      element("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, svg).textContent = this.is("bins") ? "diffusion time" : axisName[state.axis];

      const clip = `clip-${this.id}`;
      element("rect", { x: box.left - 5, y: box.top - 4, width: box.right - box.left + 10, height: box.bottom - box.top + 8 }, element("clipPath", { id: clip }, svg));
      const area = element("g", { "clip-path": `url(#${clip})` }, svg);
      if (this.is("wide")) {
        for (const run of new Set(lines.map((l) => l.run))) {
          for (const step of data.runs[run].resumed) {
            const x = px(onAxis(run, step));
            const mark = element("line", { x1: x, x2: x, y1: box.top, y2: box.bottom, class: "resume" }, area);
            element("title", {}, mark).textContent = `resumed from step ${plain(step)}`;
          }
        }
      }
      const path = (line, values, extra) => {
        let d = "", pen = "M";
        values.forEach((v, i) => {
          if (v === null || (log && v <= 0)) { pen = "M"; return; }
          d += `${pen}${px(line.x[i]).toFixed(1)} ${py(v).toFixed(1)}`;
          pen = "L";
        });
        const opacity = line.strong ? {} : { "stroke-opacity": 0.32 };
        element("path", { d, class: `line run-${line.run % 8} ${extra} ${line.dashed ? "dashed" : ""}`, ...opacity }, area);
      };
      for (const line of lines) if (line.raw) path(line, line.raw, "raw");
      for (const line of lines) {
        path(line, line.y, "");
        if (line.strong && line.x.length <= 24) {
          line.y.forEach((v, i) => { if (v !== null && (!log || v > 0)) element("circle", { cx: px(line.x[i]), cy: py(v), r: 3.2, class: `dot run-${line.run % 8}` }, area); });
        }
      }
      this.cross = element("line", { y1: box.top, y2: box.bottom, class: "cross", visibility: "hidden" }, svg);
      this.marks = element("g", {}, svg);
      this.lineSet = lines;
      this.map = { px, py, box, left, right, log };
      svg.addEventListener("pointermove", (e) => this.read(e.clientX - svg.getBoundingClientRect().left));
      svg.addEventListener("pointerdown", (e) => this.read(e.clientX - svg.getBoundingClientRect().left));
      svg.addEventListener("pointerleave", () => this.leave());
      svg.addEventListener("blur", () => this.leave());
      svg.addEventListener("keydown", (e) => {
        const way = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
        if (!way) return;
        e.preventDefault();
        this.read(Math.max(box.left, Math.min(box.right, (this.at ?? box.left) + (way * (box.right - box.left)) / 60)));
      });
    }

    leave() {
      this.at = null;
      if (this.tip) this.tip.remove();
      this.tip = null;
      this.marks?.replaceChildren();
      this.cross?.setAttribute("visibility", "hidden");
    }

    read(position) {
      const { px, py, box, left, right, log } = this.map;
      if (!this.lineSet) return;
      this.leave();
      this.at = position;
      const target = left + ((position - box.left) / (box.right - box.left)) * (right - left);
      const nearest = (x) => {
        let low = 0, high = x.length - 1;
        while (high - low > 1) { const m = (low + high) >> 1; if (x[m] <= target) low = m; else high = m; }
        return Math.abs(x[low] - target) <= Math.abs(x[high] - target) ? low : high;
      };
      const hits = this.lineSet.map((line) => ({ line, i: nearest(line.x) })).filter(({ line, i }) => line.y[i] !== null && (!log || line.y[i] > 0));
      if (!hits.length) return;
      const anchor = hits.reduce((a, b) => (Math.abs(b.line.x[b.i] - target) < Math.abs(a.line.x[a.i] - target) ? b : a));
      const x = px(anchor.line.x[anchor.i]);
      this.cross.setAttribute("visibility", "visible");
      this.cross.setAttribute("x1", x);
      this.cross.setAttribute("x2", x);
      const tip = (this.tip = document.createElement("div"));
      tip.className = "tip";
      const at = anchor.line.x[anchor.i];
      const where = this.is("bins") ? `time ${plain(at)}` : `${axisName[state.axis]} ${plain(at)}`;
      span(span(tip, "div", ""), "b", where);
      for (const { line, i } of this.is("bins") && data.runs.length === 1 ? hits.slice().reverse() : hits) {
        const row = span(tip, "div", "");
        span(row, "i", "", `swatch run-${line.run % 8}`);
        const parts = [];
        if (data.runs.length > 1) parts.push(data.runs[line.run].name);
        if (line.label) parts.push(line.label);
        if (this.is("bins")) parts.push(`step ${plain(line.step)}`);
        row.append(parts.length ? `${parts.join(", ")} ` : "");
        span(row, "b", plain(line.y[i]) + (this.is("percent") ? "%" : ""));
        if (line.raw && line.raw[i] !== null) span(row, "small", `  raw ${plain(line.raw[i])}`);
        if (line.strong) element("circle", { cx: px(line.x[i]), cy: py(line.y[i]), r: 4, class: `dot run-${line.run % 8}` }, this.marks);
      }
      this.plot.append(tip);
      const space = x + 12 + tip.offsetWidth <= this.width;
      tip.style.left = `${space ? x + 12 : Math.max(0, x - 12 - tip.offsetWidth)}px`;
    }
  }

  const charts = [...document.querySelectorAll("figure.chart")].map((figure) => new Chart(figure));
  const redraw = () => charts.forEach((chart) => chart.draw());

  const toolbar = document.getElementById("toolbar");
  if (toolbar) {
    toolbar.hidden = false;
    if (!data.runs.some((run) => run.steps.length > 1)) toolbar.querySelector("[data-control=axis]").remove();
    toolbar.addEventListener("input", ({ target }) => {
      if (target.name === "axis") state.axis = target.value;
      if (target.name === "log") state.log = target.checked;
      if (target.name === "run") state.hidden[target.checked ? "delete" : "add"](+target.value);
      if (target.name === "smooth") {
        state.smooth = target.value / 100;
        target.nextElementSibling.textContent = state.smooth.toFixed(2);
      }
      redraw();
    });
  }

  // Samples: one slider over all steps; every run shows its newest grid that is not later.
  const films = document.querySelector(".films");
  if (films) {
    const figures = [...films.querySelectorAll("figure")];
    const steps = [...new Set(figures.map((f) => +f.dataset.step))].sort((a, b) => a - b);
    const slider = document.querySelector(".slider"), input = slider.querySelector("input"), strip = document.querySelector(".strip");
    const show = () => {
      const step = steps[+input.value];
      slider.querySelector("output").textContent = `step ${plain(step)}`;
      for (const film of films.querySelectorAll(".film")) {
        const own = [...film.querySelectorAll("figure")];
        const on = own.filter((f) => +f.dataset.step <= step).pop() || own[0];
        own.forEach((f) => f.classList.toggle("on", f === on));
      }
      [...strip.children].forEach((b, i) => b.classList.toggle("on", i === +input.value));
    };
    if (steps.length > 1) {
      slider.hidden = strip.hidden = false;
      steps.forEach((step, i) => {
        const button = document.createElement("button");
        button.type = "button";
        const picture = document.createElement("img");
        picture.src = figures.find((f) => +f.dataset.step === step).querySelector("img").src;
        picture.alt = "";
        button.append(picture, plain(step));
        button.addEventListener("click", () => { input.value = i; show(); });
        strip.append(button);
      });
      slider.querySelectorAll("button").forEach((b) => b.addEventListener("click", () => { input.value = +input.value + +b.dataset.move; show(); }));
      input.addEventListener("input", show);
    }
    films.classList.add("ready");
    show();
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((d) => { d.open = true; });
    redraw();
  });
  addEventListener("afterprint", () => { opened.forEach((d) => { d.open = false; }); redraw(); });
})();
