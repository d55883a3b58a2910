// Asks Python for tokens and shows the pictures that come back; draws nothing itself.

const PACE_MS = 350; // between two tokens while playing
const TYPING_MS = 350; // without a key before a new prompt is read

function render({ model, el }) {
  let playing = false;
  let timer = null;
  let typing = null;

  const prompt = focusable(element("textarea", { rows: 3, spellcheck: false }));
  prompt.value = model.get("shown").prompt;
  const heat = focusable(element("input", { type: "range", min: 0, max: 2, step: 0.1 }));
  heat.value = model.get("shown").temperature;
  const degrees = element("output", { className: "lm-counter" });
  const caption = element("p", { className: "lm-caption" });
  caption.setAttribute("aria-live", "polite");
  const problem = element("p", { className: "lm-note" });
  problem.setAttribute("role", "alert");
  const text = element("div", { className: "lm-stage" });
  const chart = element("div");
  const rows = element("div", { className: "lm-rows" });
  rows.setAttribute("role", "group");
  rows.setAttribute("aria-label", "candidates for the next token: choose one to write it");

  function ask(what, more = {}) {
    clearTimeout(typing);
    clearTimeout(timer);
    const waiting = unanswered();
    const n = 1 + (waiting.length ? waiting[waiting.length - 1].n : model.get("shown").n);
    const request = { n, do: what, prompt: prompt.value, temperature: Number(heat.value), ...more };
    model.set("asked", [...waiting, request]);
    model.save_changes();
    root.setAttribute("aria-busy", "true");
  }
  const unanswered = () => model.get("asked").filter((request) => request.n > model.get("shown").n);
  function act(what, more) {
    pause();
    ask(what, more);
  }
  function button(label, title, onclick) {
    return focusable(element("button", { type: "button", textContent: label, title, onclick }));
  }
  const play = button("Play", "write until the text ends", () => (playing ? pause() : start()));
  const step = button("One token", "write the token that comes next", () => act("step"));
  const back = button("Back", "take the newest token back", () => act("back"));
  const restart = button("Start over", "back to the prompt", () => act("restart"));
  play.classList.add("lm-play");

  function start() {
    playing = true;
    play.textContent = "Pause";
    caption.setAttribute("aria-live", "off");
    ask("step");
  }
  function pause() {
    playing = false;
    clearTimeout(timer);
    play.textContent = "Play";
    caption.setAttribute("aria-live", "polite");
  }

  const showStale = () => {
    root.classList.toggle("lm-stale", prompt.value !== model.get("shown").prompt);
  };
  prompt.addEventListener("input", () => {
    pause();
    showStale();
    clearTimeout(typing);
    typing = setTimeout(() => ask("look"), TYPING_MS);
  });
  const showHeat = () => {
    degrees.textContent = Number(heat.value) === 0 ? "0: greedy" : heat.value;
  };
  heat.addEventListener("input", showHeat);
  heat.addEventListener("change", () => ask("look"));

  function show() {
    const shown = model.get("shown");
    text.innerHTML = shown.text;
    chart.innerHTML = shown.chart;
    fit(text, text.firstChild);
    fit(chart.parentNode, chart.firstChild);
    if (caption.textContent !== shown.caption) caption.textContent = shown.caption;
    if (problem.textContent !== shown.problem) problem.textContent = shown.problem;
    problem.hidden = shown.problem === "";
    showRows(shown);
    showStale();
    // aria-disabled, not disabled: a disabled button would drop the keyboard's focus
    for (const node of [play, step]) node.setAttribute("aria-disabled", String(shown.ended));
    for (const node of [back, restart]) {
      node.setAttribute("aria-disabled", String(shown.n_written === 0));
    }
    const busy = unanswered().length > 0;
    root.setAttribute("aria-busy", String(busy));
    if (!playing || busy) return;
    if (shown.problem || shown.ended) pause();
    else timer = setTimeout(() => ask("step"), PACE_MS);
  }

  function fit(stage, picture) {
    const width = Number(picture.getAttribute("width"));
    stage.style.flex = `1 1 ${0.85 * width}px`;
    stage.style.maxWidth = `min(100%, ${width}px)`;
  }

  // the buttons stay while their tokens change, so that the focus stays too
  function showRows(shown) {
    const height = Number(chart.firstChild.getAttribute("height"));
    while (rows.children.length < shown.rows.length) rows.append(button("", "", write));
    shown.rows.forEach((row, i) => {
      const node = rows.children[i];
      node.dataset.token = row.token;
      node.title = row.label;
      node.setAttribute("aria-label", row.label);
      node.setAttribute("aria-disabled", String(shown.ended));
      node.style.top = `${(100 * row.y) / height}%`;
      node.style.height = `${(100 * row.height) / height}%`;
    });
  }
  function write(event) {
    act("take", { token: Number(event.currentTarget.dataset.token) });
  }

  const root = element("div", { className: "lm-player lm-complete" },
    element("label", { className: "lm-prompt" }, "Prompt", prompt),
    element("div", { className: "lm-controls" },
      element("div", { className: "lm-buttons" }, play, step, back, restart),
      element("label", {}, "temperature", heat, degrees)),
    problem, caption,
    element("div", { className: "lm-view" }, text,
      element("div", { className: "lm-stage" }, chart, rows)));
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "a model completes your prompt");
  ownKeys(root, (event) => {
    const target = { ArrowRight: step, ArrowLeft: back }[event.key];
    if (event.target.tagName !== "BUTTON" || !target) return;
    event.preventDefault();
    target.click();
  });
  el.append(root);
  const forgetTheme = watchTheme(root, el);
  model.on("change:shown", show);
  showHeat();
  show();
  return () => {
    pause();
    clearTimeout(typing);
    forgetTheme();
    model.off("change:shown", show);
  };
}

export default { render };
