// What the widgets share. Python puts this text before theirs: a widget is one module.

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// JupyterLab listens before the page does; this attribute on the focused element is what it heeds.
function focusable(node) {
  node.dataset.lmSuppressShortcuts = "true";
  return node;
}

// Keys without a modifier are the widget's own: the page around it does not hear them.
function ownKeys(root, act = () => {}) {
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    act(event);
  });
}

function watchTheme(root, host) {
  // the page's own text colour tells what it is, in any front end
  const follow = () => {
    const rgb = getComputedStyle(host).color.match(/[\d.]+/g);
    const dark = rgb !== null && 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 128;
    root.classList.toggle("lm-dark", dark);
    root.classList.toggle("lm-light", !dark);
  };
  const attributes = new MutationObserver(follow);
  for (const node of [document.documentElement, document.body]) {
    attributes.observe(node, { attributes: true });
  }
  const shown = new ResizeObserver(follow); // the first time: when the widget enters the page
  shown.observe(host);
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", follow);
  follow();
  return () => {
    attributes.disconnect();
    shown.disconnect();
    system.removeEventListener("change", follow);
  };
}
