// Shows frames that draw.py drew: swaps them, reads keys and clicks, draws nothing itself.

const ICONS = {
  first: "M3 3h2v10H3zM13 3v10L6 8z",
  previous: "M11 3v10L4 8z",
  play: "M4 2.5v11L13 8z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z",
  next: "M5 3v10l7-5z",
  last: "M11 3h2v10h-2zM3 3v10l7-5z",
};
const SPEEDS = [["slow", 2000], ["normal", 1000], ["fast", 400], ["very fast", 120]];

function setIcon(button, name, label) {
  button.innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;
  button.setAttribute("aria-label", label);
  button.title = label;
}

function makeSide(frames, label, pieces, listings) {
  const stage = focusable(element("div", { className: "lm-stage", tabIndex: -1 }));
  const caption = element("p", { className: "lm-caption" });
  caption.setAttribute("aria-live", "polite");
  // an unseen copy of the longest caption keeps the picture where it is
  const longest = frames.reduce((a, f) => (f.caption.length > a.length ? f.caption : a), "");
  const ghost = element("p", { className: "lm-caption lm-ghost", textContent: longest });
  ghost.setAttribute("aria-hidden", "true");
  const view = element("div", { className: "lm-view" }, stage);
  const root = element("section", { className: "lm-side" });
  if (label) root.append(element("h4", { className: "lm-label", textContent: label }));
  root.append(element("div", { className: "lm-captions" }, ghost, caption), view);

  const hasSource = frames.some((frame) => frame.listing !== null);
  const file = element("div", { className: "lm-file" });
  const code = focusable(element("pre", { className: "lm-code", tabIndex: 0 }));
  if (hasSource) view.append(element("div", { className: "lm-source" }, file, code));
  let listed = null;
  let marked = null;

  function showSource(frame) {
    code.parentNode.classList.toggle("lm-absent", frame.listing === null);
    if (frame.listing === null) return;
    const listing = listings[frame.listing];
    if (listed !== frame.listing) {
      listed = frame.listing;
      file.textContent = listing.title;
      code.setAttribute("aria-label", `source of ${listing.title}`);
      code.replaceChildren(...listing.lines.map((line, i) => {
        const row = element("span", { className: "lm-line" });
        row.append(element("span", { className: "lm-number", textContent: listing.first + i }));
        row.append(`${line}\n`);
        return row;
      }));
    }
    marked?.classList.remove("lm-now");
    marked?.removeAttribute("aria-current");
    marked = code.children[frame.line - listing.first];
    marked.classList.add("lm-now");
    marked.setAttribute("aria-current", "step");
    // With the page's next layout, not with one of its own. Scrolls the listing only, where
    // scrollIntoView would scroll the notebook.
    const line = marked;
    requestAnimationFrame(() => {
      code.scrollTop = line.offsetTop - (code.clientHeight - line.offsetHeight) / 2;
    });
  }

  let shown = null;
  return {
    root,
    hush: (quiet) => caption.setAttribute("aria-live", quiet ? "off" : "polite"),
    show(position) {
      const ended = position >= frames.length;
      const frame = frames[ended ? frames.length - 1 : position];
      const words = ended ? `${frame.caption} (This run has ended.)` : frame.caption;
      if (caption.textContent !== words) caption.textContent = words;
      if (shown === frame) return;
      shown = frame;
      stage.innerHTML = frame.svg.map((piece) => pieces[piece]).join("");
      // beside the source while the picture keeps most of its size, else above it
      const width = Number(stage.firstChild.getAttribute("width"));
      stage.style.maxWidth = `min(100%, ${width}px)`;
      stage.style.flexBasis = `${0.88 * width}px`;
      if (hasSource) showSource(frame);
    },
  };
}

function render({ model, el }) {
  const runs = [model.get("frames"), model.get("versus")].filter((run) => run.length > 0);
  const count = Math.max(...runs.map((run) => run.length));
  const labels = model.get("labels");
  const sides = runs.map((run, i) =>
    makeSide(run, labels[i] ?? "", model.get("pieces"), model.get("listings")));
  let timer = null;

  const here = () => model.get("position");
  function go(position) {
    const inside = Math.max(0, Math.min(count - 1, position));
    if (inside === here()) return;
    model.set("position", inside);
    model.save_changes();
  }
  function step(position) {
    pause();
    go(position);
  }

  function button(name, label, act) {
    const node = focusable(element("button", { type: "button", className: `lm-${name}`, onclick: act }));
    setIcon(node, name, label);
    return node;
  }
  const first = button("first", "first step", () => step(0));
  const previous = button("previous", "previous step", () => step(here() - 1));
  const play = button("play", "play", () => (timer === null ? start() : pause()));
  const next = button("next", "next step", () => step(here() + 1));
  const last = button("last", "last step", () => step(count - 1));
  const slider = focusable(element("input", { type: "range", min: 0, max: count - 1, step: 1 }));
  slider.addEventListener("input", () => step(Number(slider.value)));
  const counter = element("output", { className: "lm-counter" });
  const speed = focusable(element("select"));
  for (const [name, ms] of SPEEDS) speed.append(element("option", { textContent: name, value: ms }));
  speed.value = 1000;
  speed.addEventListener("change", () => timer !== null && start());

  function start() {
    clearInterval(timer);
    if (here() === count - 1) go(0);
    timer = setInterval(() => (here() < count - 1 ? go(here() + 1) : pause()), Number(speed.value));
    setIcon(play, "pause", "pause");
    sides.forEach((side) => side.hush(true));
  }
  function pause() {
    if (timer === null) return;
    clearInterval(timer);
    timer = null;
    setIcon(play, "play", "play");
    sides.forEach((side) => side.hush(false));
  }

  const page = Math.max(2, Math.round(count / 10));
  const keys = {
    ArrowRight: () => step(here() + 1),
    ArrowUp: () => step(here() + 1),
    ArrowLeft: () => step(here() - 1),
    ArrowDown: () => step(here() - 1),
    PageUp: () => step(here() + page),
    PageDown: () => step(here() - page),
    Home: () => step(0),
    End: () => step(count - 1),
    " ": () => play.click(),
  };
  const scrolls = ["ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End"];
  function onKey(event) {
    const tag = event.target.tagName;
    const native =
      tag === "SELECT" ||
      (tag === "BUTTON" && event.key === " ") ||
      (tag === "PRE" && scrolls.includes(event.key));
    if (native || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  }

  function show() {
    const position = here();
    sides.forEach((side) => side.show(position));
    const words = `step ${position + 1} of ${count}`;
    slider.value = position;
    slider.setAttribute("aria-valuetext", words);
    counter.textContent = words;
    // aria-disabled, not disabled: a disabled button would drop the keyboard's focus
    for (const [node, end] of [[first, 0], [previous, 0], [next, count - 1], [last, count - 1]]) {
      node.setAttribute("aria-disabled", String(position === end));
    }
  }

  const root = element("div", { className: "lm-player" });
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", model.get("title") || "step by step");
  if (model.get("title")) {
    root.append(element("h3", { className: "lm-title", textContent: model.get("title") }));
  }
  if (model.get("note")) {
    root.append(element("p", { className: "lm-note", textContent: model.get("note") }));
  }
  root.append(
    element("div", { className: "lm-controls" },
      element("div", { className: "lm-buttons" }, first, previous, play, next, last),
      element("label", { className: "lm-position" }, "step", slider), counter,
      element("label", { className: "lm-speed" }, "speed", speed)),
    element("div", { className: "lm-sides" }, ...sides.map((side) => side.root)),
  );
  ownKeys(root, onKey);
  el.append(root);
  const forgetTheme = watchTheme(root, el);
  model.on("change:position", show);
  show();
  return () => {
    pause();
    forgetTheme();
    model.off("change:position", show);
  };
}

export default { render };
