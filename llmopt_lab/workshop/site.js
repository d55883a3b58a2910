// Plays what the page holds as data: no kernel, no network. `renderPlayer` is the widget's own.

function modelOf(data, state) {
  const values = { ...state, pieces: data.pieces, listings: data.listings };
  const heard = new Map();
  return {
    get: (name) => values[name],
    set(name, value) {
      values[name] = value;
      heard.get(`change:${name}`)?.forEach((call) => call());
    },
    save_changes() {},
    on(name, call) {
      heard.set(name, [...(heard.get(name) ?? []), call]);
    },
    off(name, call) {
      heard.set(name, (heard.get(name) ?? []).filter((other) => other !== call));
    },
  };
}

function show(place) {
  const data = JSON.parse(place.querySelector("script").textContent);
  const stage = element("div");
  let forget = () => {};

  function put(state) {
    forget();
    forget = () => {};
    stage.replaceChildren();
    if (state === undefined || state.problem) {
      const why = state?.problem ? `Not possible: ${state.problem}` :
        "This position is not on the page. Open the notebook to see it.";
      stage.append(element("p", { className: "lm-static-note", textContent: why }));
    } else {
      forget = renderPlayer({ model: modelOf(data, state), el: stage });
    }
  }

  if (data.sliders.length === 0) {
    place.replaceChildren(stage);
    put(data.states[0]);
    return;
  }
  const at = data.sliders.map((slider) => slider.index);
  const said = element("p", { className: "lm-unseen" });
  said.setAttribute("role", "status");
  const sliders = data.sliders.map((slider, i) => {
    const value = element("output", { textContent: slider.options[at[i]] });
    const input = element("input", { type: "range", min: 0, max: slider.options.length - 1, step: 1 });
    input.value = at[i];
    const say = () => {
      value.textContent = slider.options[at[i]];
      input.setAttribute("aria-valuetext", value.textContent);
    };
    say();
    input.addEventListener("input", () => {
      at[i] = Number(input.value);
      say();
      const state = data.states[data.positions.indexOf(at.join(","))];
      put(state);
      said.textContent = state?.frames ? state.frames[state.position].caption : "";
    });
    return element("label", { className: "lm-static-slider" }, slider.label, input, value);
  });
  place.replaceChildren(...sliders, said, stage);
  put(data.states[0]);
}

for (const place of document.querySelectorAll(".lm-static")) show(place);
