// A native slider over a list of values. Python hears of a value when the slider rests on it.

function render({ model, el }) {
  const options = model.get("options");
  const input = focusable(element("input",
    { type: "range", className: "lm-slide", min: 0, max: options.length - 1, step: 1 }));
  const value = element("output");

  function say() {
    value.textContent = options[Number(input.value)];
    input.setAttribute("aria-valuetext", value.textContent);
  }
  function show() {
    input.value = model.get("index");
    say();
  }
  input.addEventListener("input", say);
  input.addEventListener("change", () => {
    model.set("index", Number(input.value));
    model.save_changes();
  });

  const root = element("div", { className: "lm-slider" },
    element("label", {}, model.get("label"), input, value));
  ownKeys(root);
  el.append(root);
  const forgetTheme = watchTheme(root, el);
  model.on("change:index", show);
  show();
  return () => {
    forgetTheme();
    model.off("change:index", show);
  };
}

export default { render };
