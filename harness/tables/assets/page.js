"use strict";
// The tables and charts of a report. All texts of the run reach the page as text nodes; no value is ever read as HTML.
const PAGE_ROWS = 50, FEW = 14, COLLATOR = new Intl.Collator("en", { numeric: true });  // 2.x before 10.x

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties || {});
  node.append(...children.filter((child) => child !== null));
  return node;
}

function complain(text) {
  const box = document.getElementById("trouble");
  box.hidden = false;
  box.append(make("p", { textContent: text }));
}

async function inflated(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (one) => one.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function shown(value, kind) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (kind === "exact") return String(value);
  if (kind === "p") return value < 1e-4 ? "<0.0001" : value < 0.1 ? value.toFixed(4) : value.toFixed(2);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return String(value);
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-4 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
}

// "<0.05", ">= 2", "=3" and "1..2" compare numbers; anything else is looked for in the text that is shown.
function numberTest(text) {
  const range = text.match(/^\s*(-?[\d.eE+-]+)\s*\.\.\s*(-?[\d.eE+-]+)\s*$/);
  if (range) return (value) => value !== null && value >= Number(range[1]) && value <= Number(range[2]);
  const one = text.match(/^\s*(<=|>=|<|>|=)\s*(-?[\d.]+(?:[eE][+-]?\d+)?)\s*$/);
  if (!one) return null;
  const bound = Number(one[2]);
  const tests = { "<": (v) => v < bound, ">": (v) => v > bound, "<=": (v) => v <= bound, ">=": (v) => v >= bound,
                  "=": (v) => v === bound };
  return (value) => value !== null && tests[one[1]](value);
}

class CellTable {
  constructor(box, table, page) {
    Object.assign(this, { box, table, page, filters: new Map(), words: [], sorted: null, up: true, first: 0,
                          opened: new Set() });
    this.columns = table.columns.map((column, i) => ({ ...column, i })).filter((column) => column.shown);
    this.build();
    this.refresh();
  }

  value(row, i) { return this.table.data[i][row]; }

  text(row, column) { return shown(this.value(row, column.i), column.kind); }

  build() {
    this.search = make("input", { type: "search", placeholder: "search", oninput: () => {
      this.words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      this.changed();
    } });
    this.search.setAttribute("aria-label", "search in all columns");
    this.count = make("span", { className: "count" });
    this.back = make("button", { type: "button", textContent: "‹ back", onclick: () => this.go(-PAGE_ROWS) });
    this.next = make("button", { type: "button", textContent: "next ›", onclick: () => this.go(PAGE_ROWS) });
    const reset = make("button", { type: "button", textContent: "reset", onclick: () => this.reset() });
    const save = make("button", { type: "button", textContent: "CSV", onclick: () => this.save(),
                                  title: "save the rows that pass the filters" });
    const names = make("tr", {}, make("th"));
    const inputs = make("tr", {}, make("th"));
    this.heads = this.columns.map((column) => {
      const head = make("th", { className: column.kind === "text" ? "" : "number", title: column.help || "" },
        make("button", { type: "button", textContent: column.name, onclick: () => this.sort(column) }));
      names.append(head);
      inputs.append(make("th", {}, this.filterOf(column)));
      return head;
    });
    this.body = make("tbody");
    const whole = make("table", { className: "cells" }, make("thead", {}, names, inputs), this.body);
    this.box.append(make("div", { className: "bar" }, this.search, this.back, this.next, this.count, reset, save),
      make("div", { className: "scroll" }, whole));
  }

  filterOf(column) {
    const values = column.kind === "text" ? [...new Set(this.table.data[column.i])] : [];
    const label = `filter ${column.name}`;
    let input;
    if (column.kind === "text" && values.length <= FEW) {
      input = make("select", {}, make("option", { value: "", textContent: "all" }),
        ...values.map((value, i) => make("option", { value: String(i), textContent: shown(value) })));
      input.onchange = () => {
        const wanted = values[Number(input.value)];
        this.filter(column, input.value === "" ? null : (value) => value === wanted);
      };
    } else {
      input = make("input", { placeholder: column.kind === "text" ? "contains" : "<0.05" });
      input.oninput = () => {
        const text = input.value.trim().toLowerCase();
        const test = column.kind === "text" ? null : numberTest(text);
        const contains = (value) => shown(value, column.kind).toLowerCase().includes(text);
        this.filter(column, text === "" ? null : test || contains);
      };
    }
    input.setAttribute("aria-label", label);
    return input;
  }

  filter(column, test) {
    if (test) this.filters.set(column.i, test); else this.filters.delete(column.i);
    this.changed();
  }

  sort(column) {
    this.up = this.sorted === column ? !this.up : true;
    this.sorted = column;
    this.changed();
  }

  reset() {
    this.box.querySelectorAll("input, select").forEach((input) => { input.value = ""; });
    this.filters.clear();
    Object.assign(this, { words: [], sorted: null, up: true });
    this.opened.clear();
    this.changed();
  }

  changed() { this.first = 0; this.refresh(); }

  go(by) { this.first = Math.max(0, this.first + by); this.draw(); }

  refresh() {
    const texts = this.columns.filter((column) => column.kind === "text").map((column) => this.table.data[column.i]);
    const tests = [...this.filters];
    this.rows = [];
    for (let row = 0; row < this.table.n; row++) {
      if (!tests.every(([i, test]) => test(this.value(row, i)))) continue;
      if (this.words.length) {
        const whole = texts.map((values) => values[row]).join(" ").toLowerCase();
        if (!this.words.every((word) => whole.includes(word))) continue;
      }
      this.rows.push(row);
    }
    if (this.sorted) {
      const values = this.keys(this.sorted), sign = this.up ? 1 : -1;
      this.rows.sort((a, b) => {  // rows without a value come last in either direction
        const one = values[a], other = values[b];
        if (one === null || other === null) return (one === null) - (other === null) || a - b;
        return sign * (one - other) || a - b;
      });
    }
    this.columns.forEach((column, i) => {
      const state = this.sorted !== column ? "none" : this.up ? "ascending" : "descending";
      this.heads[i].setAttribute("aria-sort", state);
      this.heads[i].firstChild.textContent = column.name + { none: "", ascending: " ▲", descending: " ▼" }[state];
    });
    this.draw();
  }

  keys(column) {  // numbers that sort as the values do: for texts their places among the different ones
    if (column.kind !== "text") return this.table.data[column.i];
    if (!column.keys) {
      const texts = [...new Set(this.table.data[column.i])].filter((one) => one !== null);
      const place = new Map(texts.sort((one, other) => COLLATOR.compare(one, other)).map((one, i) => [one, i]));
      column.keys = this.table.data[column.i].map((one) => (one === null ? null : place.get(one)));
    }
    return column.keys;
  }

  draw() {
    const page = this.rows.slice(this.first, this.first + PAGE_ROWS);
    this.body.replaceChildren(...page.flatMap((row) => this.rowOf(row)));
    const last = this.first + page.length;
    this.count.textContent = this.rows.length
      ? `${this.first + 1} to ${last} of ${this.rows.length}` +
        (this.rows.length < this.table.n ? ` (${this.table.n} without filters)` : "")
      : `0 of ${this.table.n}`;
    this.back.disabled = this.first === 0;
    this.next.disabled = last >= this.rows.length;
  }

  rowOf(row) {
    const open = this.opened.has(row);
    const button = make("button", { type: "button", className: "open", textContent: open ? "−" : "+", onclick: () => {
      if (!this.opened.delete(row)) this.opened.add(row);
      this.draw();
    } });
    button.setAttribute("aria-expanded", String(open));
    button.setAttribute("aria-label", "details");
    const line = make("tr", { className: "row" }, make("td", {}, button), ...this.columns.map((column) => {
      return make("td", { className: column.kind === "text" ? "" : "number", textContent: this.text(row, column),
                          title: shown(this.value(row, column.i), "exact") });
    }));
    return open ? [line, make("tr", { className: "detail" },
      make("td", { colSpan: this.columns.length + 1 }, ...this.detailOf(row)))] : [line];
  }

  detailOf(row) {
    const pairs = make("dl", {}, ...this.table.columns.map((column, i) => ({ ...column, i }))
      .filter((column) => this.value(row, column.i) !== null)
      .map((column) => make("div", { title: column.help || "" }, make("dt", { textContent: column.name }),
        make("dd", { textContent: this.text(row, column) }))));
    const examples = (this.table.examples || {})[row];
    if (!examples) return [pairs, this.table.no_examples ? make("p", { className: "soft",
                                                                      textContent: this.table.no_examples }) : null]
      .filter(Boolean);
    const names = ["example", "text", ...this.table.score_names];
    const head = make("tr", {}, ...names.map((name, i) => make("th", { textContent: name,
                                                                       className: i > 1 ? "number" : "" })));
    const lines = examples.map(([id, text, ...scores]) => make("tr", {}, make("td", { textContent: id }),
      make("td", { className: "text", textContent: text === null ? "–" : this.page.texts[text] }),
      ...scores.map((score) => make("td", { className: "number", textContent: shown(score) }))));
    return [pairs, make("p", { className: "soft", textContent: this.table.about_examples }),
            make("div", { className: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines)))];
  }

  openRow(row) {  // from a chart
    this.reset();
    this.opened.add(row);
    this.first = PAGE_ROWS * Math.floor(this.rows.indexOf(row) / PAGE_ROWS);
    this.draw();
    this.body.querySelector("tr.detail").scrollIntoView({ block: "center" });
  }

  hover(row) {  // plotly reads some tags in its labels, so that texts are escaped
    if (row === null) return "";
    const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
    return this.columns.filter((column) => this.value(row, column.i) !== null)
      .map((column) => `${escaped(column.name)}: ${escaped(this.text(row, column))}`).join("<br>");
  }

  save() {
    const quoted = (value) => {
      const text = value === null ? "" : String(value);
      const plain = typeof value === "string" && /^[=+\-@\t\r\n]/.test(text) ? `'${text}` : text;  // no formula
      return /[",\r\n]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
    };
    const lines = [this.table.columns.map((column) => quoted(column.name)),
                   ...this.rows.map((row) => this.table.columns.map((_, i) => quoted(this.value(row, i))))];
    const url = URL.createObjectURL(new Blob([lines.map((line) => line.join(",")).join("\n") + "\n"],
                                             { type: "text/csv" }));
    make("a", { href: url, download: "rows.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }
}

function showChart(box, chart, tables) {
  const plot = make("div", { className: "plot" });
  const draw = (view) => {
    if (chart.table !== null) view.traces.forEach((trace) => {
      if (trace.customdata) trace.hovertext = trace.customdata.map((one) => Array.isArray(one)
        ? one.map((row) => tables[chart.table].hover(row)) : tables[chart.table].hover(one));
    });
    const layout = { font: { size: 13, family: "system-ui, DejaVu Sans, sans-serif" }, paper_bgcolor: "#fff",
                     plot_bgcolor: "#fff", hoverlabel: { align: "left" }, ...view.layout };
    if (window.innerWidth < 600) {
      Object.assign(layout, { font: { ...layout.font, size: 11 }, margin: { ...layout.margin, l: 45 } });
      if (layout.showlegend) {  // above the chart, where nothing is below it
        Object.assign(layout, { height: layout.height + 90, margin: { ...layout.margin, t: 110 } });
        layout.legend = { ...layout.legend, orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" };
      }
      layout.xaxis = { ...layout.xaxis, title: { ...(layout.xaxis || {}).title, font: { size: 10 } } };
      view.traces.forEach((trace) => {  // numbers would run into each other
        if (trace.colorbar) trace.colorbar = { ...trace.colorbar, title: null, thickness: 8 };
        if (trace.type === "heatmap" && trace.x.length > 5) trace.texttemplate = "";
      });
    }
    plot.style.height = `${layout.height}px`;
    return Plotly.react(plot, view.traces, layout, { responsive: true, displaylogo: false,
      displayModeBar: window.innerWidth >= 600, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
  };
  if (chart.views.length > 1) {
    const choice = make("select", {}, ...chart.views.map((view, i) => make("option", { value: String(i),
                                                                                      textContent: view.label })));
    choice.onchange = () => draw(chart.views[Number(choice.value)]);
    choice.setAttribute("aria-label", chart.chooses || "view");
    box.prepend(make("div", { className: "bar" }, make("label", {}, `${chart.chooses || "view"} `, choice)));
  }
  box.querySelector("figcaption").before(plot);
  const first = () => draw(chart.views[0]).then(() => {
    box.dataset.drawn = "true";
    plot.on("plotly_click", (event) => {
      const row = event.points[0].customdata;
      if (chart.table !== null && typeof row === "number") tables[chart.table].openRow(row);
    });
  });
  const watch = new IntersectionObserver((seen) => {
    if (seen.some((one) => one.isIntersecting)) { watch.disconnect(); first(); }
  }, { rootMargin: "600px" });
  watch.observe(box);
}

window.addEventListener("error", (event) => complain(`This page has an error: ${event.message}`));
window.addEventListener("unhandledrejection", (event) => complain(`This page has an error: ${event.reason}`));

(async () => {
  if (typeof DecompressionStream === "undefined") {
    complain("Charts and tables need a browser of 2023 or later. The Markdown page beside this one has the numbers.");
    return;
  }
  const page = JSON.parse(await inflated("data"));
  const tables = page.tables.map((table, i) => new CellTable(document.getElementById(`table-${i}`), table, page));
  if (document.getElementById("library")) {
    document.head.append(make("script", { textContent: await inflated("library") }));
    page.charts.forEach((chart, i) => showChart(document.getElementById(`chart-${i}`), chart, tables));
  }
  document.body.dataset.ready = "true";
})();
