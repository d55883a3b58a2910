// A question whose answer Python keeps until the guess is locked.

let questions = 0; // radio buttons of one question share a name

function render({ model, el }) {
  const choices = model.get("choices");
  const group = `lm-question-${(questions += 1)}`;
  const inputs = (choices.length ? choices : [""]).map((choice) => focusable(element("input",
    choices.length
      ? { type: "radio", name: group, value: choice, required: true }
      : { type: "number", step: "any", required: true })));
  const entry = choices.length
    ? element("div", { className: "lm-choices" },
        ...inputs.map((input, i) => element("label", {}, input, choices[i])))
    : element("label", {}, "Your prediction", inputs[0], model.get("unit"));
  const lock = focusable(element("button", { type: "submit", textContent: "Lock it in" }));
  const verdict = element("p", { className: "lm-verdict" });
  const explanation = element("p");
  const told = element("div", {}, verdict, explanation);
  told.setAttribute("aria-live", "polite");
  const form = element("form", {},
    element("fieldset", {},
      element("legend", { textContent: model.get("question") }),
      element("div", { className: "lm-answer" }, entry, lock)),
    told);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (model.get("locked")) return;
    const chosen = inputs.find((input) => !choices.length || input.checked);
    model.set("guess", chosen.value);
    model.set("locked", true);
    model.save_changes();
  });

  function show() {
    const locked = model.get("locked");
    for (const input of inputs) {
      input.disabled = locked;
      if (choices.length) input.checked = input.value === model.get("guess");
      else if (locked) input.value = model.get("guess");
    }
    lock.disabled = locked;
    lock.textContent = locked ? "Locked" : "Lock it in";
    const waiting = locked ? "Locked in. The answer appears here once it is measured." : "";
    verdict.textContent = model.get("verdict") || waiting;
    explanation.textContent = model.get("explanation");
  }

  const root = element("div", { className: "lm-predict" }, form);
  ownKeys(root);
  el.append(root);
  const forgetTheme = watchTheme(root, el);
  const changes = ["change:locked", "change:guess", "change:verdict", "change:explanation"];
  for (const change of changes) model.on(change, show);
  show();
  return () => {
    forgetTheme();
    for (const change of changes) model.off(change, show);
  };
}

export default { render };
