// A grid to paint with mouse or keys. Every number is a sum over painted cells, made here.

function render({ model, el }) {
  const columns = model.get("column_labels");
  const rows = model.get("row_labels");
  const allowed = model.get("allowed");
  const costs = model.get("costs");
  const everything = allowed.flatMap((may, i) => (may ? [i] : []));
  const most = costs.map((cost) => sum(everything, cost.cells) + cost.fixed);
  let painted = new Set(model.get("painted"));
  let brush = null; // while the mouse is down: true paints, false rubs out

  function sum(numbers, values) {
    let total = 0;
    for (const i of numbers) total += values[i];
    return total;
  }
  const percent = (share) => `${(100 * Math.abs(share)).toFixed(1)}%`;
  const share = () => model.get("shares")[model.get("shown")];

  // the grid: one cell in the tab order, arrows move within
  const cells = allowed.map((may, i) => {
    const cell = element("div", { className: "lm-block", tabIndex: -1 });
    cell.setAttribute("role", "gridcell");
    cell.append(element("span"));
    if (may) cell.append(mark("good"), mark("bad"), mark("cached"));
    else cell.setAttribute("aria-disabled", "true");
    cell.dataset.i = i;
    return focusable(cell);
  });
  function mark(tone) {
    const box = element("i", { className: `lm-on-${tone}` });
    box.innerHTML = `<svg viewBox="-6 -6 12 12" aria-hidden="true"><path d="${MARKS[tone]}"/></svg>`;
    return box;
  }
  function labelled(role, text) {
    const node = element("div", { className: `lm-${role}`, textContent: text });
    node.setAttribute("role", role);
    return node;
  }
  const corner = labelled("columnheader", "q \\ k");
  corner.setAttribute("aria-label", "queries down, keys across");
  const grid = element("div", { className: "lm-blocks" },
    rowOf(corner, ...columns.map((name) => labelled("columnheader", name))),
    ...rows.map((name, r) => rowOf(labelled("rowheader", `q ${name}`),
      ...cells.slice(r * columns.length, (r + 1) * columns.length))));
  function rowOf(...nodes) {
    const row = element("div", { className: "lm-row" }, ...nodes);
    row.setAttribute("role", "row");
    return row;
  }
  grid.setAttribute("role", "grid");
  grid.setAttribute("aria-multiselectable", "true");
  grid.setAttribute("aria-label", "blocks of queries (rows) and keys (columns)");
  grid.style.maxWidth = `${64 + 36 * columns.length}px`;
  cells[everything[0]].tabIndex = 0;

  const caption = element("p", { className: "lm-caption" });
  caption.setAttribute("aria-live", "polite");
  const meters = ["attention kept", ...costs.map((cost) => cost.title)].map((title) => {
    const value = element("span", { className: "lm-value" });
    const bar = element("div", { className: "lm-bar" }, element("div"));
    return { value, bar, node: element("div", { className: "lm-gauge" },
      element("div", { className: "lm-gauge-title", textContent: title }), value, bar) };
  });
  const legend = element("ul", { className: "lm-legend" },
    ...Object.entries(NAMES).map(([tone, name]) => {
      const sample = element("span", { className: `lm-block lm-${tone}` });
      if (tone !== "idle") sample.append(mark(tone));
      return element("li", {}, sample, name);
    }));

  const head = focusable(element("select", {},
    ...model.get("names").map((name, i) => element("option", { value: i, textContent: name }))));
  head.addEventListener("change", () => {
    model.set("shown", Number(head.value));
    model.save_changes();
  });
  const starts = model.get("presets").map((preset) =>
    focusable(element("button", { type: "button", textContent: preset.name,
      onclick: () => {
        model.set("painted", preset.painted);
        model.save_changes();
      } })));
  const answer = element("p", { className: "lm-answer-text" });
  answer.setAttribute("role", "status");
  const ask = focusable(element("button", { type: "button", className: "lm-play",
    textContent: model.get("ask_label") }));
  ask.addEventListener("click", () => {
    if (busy()) return;
    model.set("painted", [...painted]);
    model.set("asked", model.get("asked") + 1);
    model.save_changes();
    showAnswer();
  });
  const busy = () => model.get("asked") > model.get("answer").n;
  function showAnswer() {
    ask.setAttribute("aria-disabled", String(busy()));
    answer.textContent = busy() ? "…" : model.get("answer").text;
    answer.classList.remove("lm-old");
  }

  function turn(i, on) {
    if (!allowed[i] || painted.has(i) === on) return false;
    if (on) painted.add(i);
    else painted.delete(i);
    showCell(i);
    answer.classList.add("lm-old");
    return true;
  }
  function keep() { // what Python knows, once a stroke is over
    model.set("painted", [...painted].sort((a, b) => a - b));
    model.save_changes();
  }
  function follow() { // a preset, Python, or the other view of this widget
    const wanted = new Set(model.get("painted"));
    let turned = false;
    for (const i of everything) turned = turn(i, wanted.has(i)) || turned;
    if (turned) count();
  }

  function showCell(i) {
    const value = share()[i];
    const on = painted.has(i);
    const tone = on ? "good" : !allowed[i] ? "idle" : value >= LOST ? "bad" : "cached";
    const cell = cells[i];
    cell.className = `lm-block lm-${tone}`;
    cell.style.setProperty("--lm-heat", (0.5 * Math.sqrt(Math.min(1, value))).toFixed(2));
    cell.firstChild.textContent = value >= LOST ? (100 * value).toFixed(0) : "";
    const where = `queries ${rows[Math.floor(i / columns.length)]}, keys ${columns[i % columns.length]}`;
    const words = `${where}: ${NAMES[tone]}` + (allowed[i] ? `; ${percent(value)} of the row's attention` : "");
    cell.setAttribute("aria-label", words);
    cell.title = words;
    cell.setAttribute("aria-selected", String(on));
  }
  function count() {
    const values = share();
    const kept = rows.map(() => 0);
    for (const i of painted) kept[Math.floor(i / columns.length)] += values[i];
    const mean = kept.reduce((a, b) => a + b, 0) / kept.length;
    const least = kept.reduce((best, x, r) => (x < kept[best] ? r : best), 0);
    const spent = costs.map((cost) => sum(painted, cost.cells) + cost.fixed);
    let words = `${model.get("names")[model.get("shown")]}: ${painted.size} of ${everything.length} `
      + `blocks read, ${percent(mean)} of the attention kept.`;
    costs.forEach((cost, c) => { words += ` ${cost.title}: ${percent(spent[c] / most[c])} of dense.`; });
    words += ` Row q ${rows[least]} keeps least, ${percent(kept[least])}.`;
    caption.textContent = words;
    gauge(0, mean, percent(mean));
    costs.forEach((cost, c) => gauge(c + 1, spent[c] / most[c],
      `${spent[c].toLocaleString("en-US")} ${cost.unit}, ${percent(spent[c] / most[c])} of dense`));
  }
  function gauge(which, part, words) {
    meters[which].value.textContent = words;
    meters[which].bar.firstChild.style.width = `${(100 * Math.max(0, Math.min(1, part))).toFixed(1)}%`;
  }

  // mouse, pen and finger
  let at = null; // where the brush was last
  const under = (x, y) => {
    const node = document.elementFromPoint(x, y)?.closest?.(".lm-block");
    return node && grid.contains(node) ? Number(node.dataset.i) : null;
  };
  grid.addEventListener("pointerdown", (event) => {
    const i = under(event.clientX, event.clientY);
    if (i === null || event.button !== 0 || !allowed[i]) return;
    event.preventDefault();
    brush = !painted.has(i);
    at = [event.clientX, event.clientY];
    grid.setPointerCapture(event.pointerId);
    focusOn(i);
    if (turn(i, brush)) count();
  });
  grid.addEventListener("pointermove", (event) => {
    if (brush === null) return;
    // a fast hand crosses several blocks between two events: paint the line between them
    const [x, y] = at;
    at = [event.clientX, event.clientY];
    const steps = Math.ceil(Math.hypot(at[0] - x, at[1] - y) / 6);
    let turned = false;
    for (let k = 1; k <= steps; k += 1) {
      const i = under(x + ((at[0] - x) * k) / steps, y + ((at[1] - y) * k) / steps);
      if (i !== null) turned = turn(i, brush) || turned;
    }
    if (turned) count();
  });
  function lift() {
    if (brush === null) return;
    brush = null;
    keep();
  }
  grid.addEventListener("pointerup", lift);
  grid.addEventListener("pointercancel", lift);

  // keys
  function done() {
    count();
    keep();
  }
  const MOVES = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
  function focusOn(i) {
    cells.forEach((cell) => { cell.tabIndex = -1; });
    cells[i].tabIndex = 0;
    cells[i].focus({ preventScroll: true });
  }
  function next(i, [down, right]) { // the next one that may be painted; this one if there is none
    let row = Math.floor(i / columns.length) + down;
    let column = (i % columns.length) + right;
    while (row >= 0 && row < rows.length && column >= 0 && column < columns.length) {
      const there = row * columns.length + column;
      if (allowed[there]) return there;
      row += down;
      column += right;
    }
    return i;
  }
  grid.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.dataset.i) return;
    const i = Number(event.target.dataset.i);
    if (event.key in MOVES) {
      const there = next(i, MOVES[event.key]);
      focusOn(there);
      if (event.shiftKey && turn(there, painted.has(i))) done();
    } else if (event.key === "Home" || event.key === "End") {
      const row = everything.filter((j) => Math.floor(j / columns.length) === Math.floor(i / columns.length));
      focusOn(event.key === "Home" ? row[0] : row[row.length - 1]);
    } else if (event.key === " " || event.key === "Enter") {
      turn(i, !painted.has(i));
      done();
    } else return;
    event.preventDefault();
  });

  const tools = element("div", { className: "lm-controls" },
    element("label", {}, model.get("choose"), head),
    element("div", { className: "lm-buttons" }, ...starts));
  const side = element("div", { className: "lm-tally" }, ...meters.map((meter) => meter.node), legend);
  if (model.get("ask_label")) side.append(element("div", { className: "lm-ask" }, ask, answer));
  const root = element("div", { className: "lm-player lm-paint" });
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", model.get("title") || "a mask to paint");
  if (model.get("title")) root.append(element("h3", { className: "lm-title", textContent: model.get("title") }));
  root.append(tools,
    element("p", { className: "lm-keys", textContent: "Rows are blocks of queries, columns "
      + "blocks of keys; a number is the percentage of its row's attention. Press and drag to paint. "
      + "Keys: arrows move, space turns a block, shift with an arrow draws on." }),
    caption, element("div", { className: "lm-view" }, grid, side));
  ownKeys(root);
  el.append(root);

  function show() {
    head.value = model.get("shown");
    cells.forEach((_, i) => showCell(i));
    count();
  }
  const forgetTheme = watchTheme(root, el);
  const changes = { "change:painted": follow, "change:shown": show,
    "change:answer": showAnswer, "change:asked": showAnswer };
  for (const [change, act] of Object.entries(changes)) model.on(change, act);
  show();
  showAnswer();
  return () => {
    forgetTheme();
    for (const [change, act] of Object.entries(changes)) model.off(change, act);
  };
}

export default { render };
