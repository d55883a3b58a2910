"""How a tone looks on light and on dark pages: colours, marks and borders, and the style sheets.

A tone differs from every other one in its mark or its border, never only in colour.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How one tone is told apart: by two colours, and without them by mark and border."""

    word: str  # in the legend, unless the frame has a better name
    light: tuple[str, str]  # (border and mark, fill)
    dark: tuple[str, str]
    mark: str = ""  # SVG path, relative to the middle of the mark
    border: str = ""  # extra CSS


# Okabe and Ito's colours; borders darkened on light pages to stand out 3:1 from the card.
LOOKS = {
    "idle": Look("empty", ("#868e98", "#f6f7f8"), ("#737d88", "#1f242a"), border="stroke-width:1"),
    "active": Look(
        "in use", ("#0072b2", "#e3f0f9"), ("#56b4e9", "#15344a"), "m-2.8-3.6l6.4 3.6l-6.4 3.6z"
    ),
    "shared": Look(
        "shared",
        ("#7a4fa3", "#eee4f7"),
        ("#c3a1ec", "#3a2a52"),
        "m-4.6 0a2.8 2.8 0 1 0 5.6 0a2.8 2.8 0 1 0-5.6 0zm3.6 0a2.8 2.8 0 1 0 5.6 0"
        "a2.8 2.8 0 1 0-5.6 0z",
    ),
    "new": Look(
        "changed by this step",
        ("#b26a00", "#fff0c9"),
        ("#ffc247", "#4d3a0c"),
        "m0-4.8l1.3 3.5l3.5 1.3l-3.5 1.3l-1.3 3.5l-1.3-3.5l-3.5-1.3l3.5-1.3z",
        "stroke-width:2.75",
    ),
    "cached": Look(
        "cached",
        ("#5d6b78", "#e9eef2"),
        ("#a3b3c2", "#2b343d"),
        "m-3.6-1.1h7.2v2.2h-7.2z",
        "stroke-dasharray:4 3",
    ),
    "bad": Look(
        "wasted or wrong",
        ("#c24a00", "#fde5da"),
        ("#ff8a57", "#4c2415"),
        "m-3.5-2.3l1.2-1.2l2.3 2.3l2.3-2.3l1.2 1.2l-2.3 2.3l2.3 2.3l-1.2 1.2l-2.3-2.3l-2.3 2.3"
        "l-1.2-1.2l2.3-2.3z",
    ),
    "good": Look(
        "accepted",
        ("#007a59", "#dbf3ea"),
        ("#3fcf9f", "#123d30"),
        "m-3.9 .2l1.3-1.3l1.8 1.8l3.4-3.7l1.3 1.2l-4.7 5.1z",
    ),
    "owner0": Look(
        "owner 0",
        ("#0072b2", "#cfe5f5"),
        ("#4aa8e0", "#123a54"),
        "m-3.3 0a3.3 3.3 0 1 0 6.6 0a3.3 3.3 0 1 0-6.6 0z",
    ),
    "owner1": Look("owner 1", ("#a86d00", "#fbe5b6"), ("#e69f00", "#4a3508"), "m-3-3h6v6h-6z"),
    "owner2": Look(
        "owner 2", ("#00805d", "#c6ebdd"), ("#2cc295", "#0f4032"), "m0-3.7l3.7 6.6h-7.4z"
    ),
    "owner3": Look(
        "owner 3",
        ("#a94f85", "#f6dcea"),
        ("#e08fbd", "#4a2139"),
        "m0-4.1l4.1 4.1l-4.1 4.1l-4.1-4.1z",
    ),
    "owner4": Look(
        "owner 4", ("#c24a00", "#fcdcca"), ("#f5803e", "#4d2510"), "m0 3.7l3.7-6.6h-7.4z"
    ),
    "owner5": Look(
        "owner 5",
        ("#2b7fa8", "#dff3fd"),
        ("#8fd3f7", "#20414f"),
        "m-1.3-3.9h2.6v2.6h2.6v2.6h-2.6v2.6h-2.6v-2.6h-2.6v-2.6h2.6z",
    ),
    "owner6": Look(
        "owner 6",
        ("#7f7600", "#f7f3b4"),
        ("#f0e442", "#45420c"),
        "m-3.7 0a3.7 3.7 0 1 0 7.4 0a3.7 3.7 0 1 0-7.4 0zm2 0a1.7 1.7 0 1 0 3.4 0"
        "a1.7 1.7 0 1 0-3.4 0z",
    ),
    "owner7": Look(
        "owner 7", ("#4d5560", "#dde1e6"), ("#c9d1d9", "#3a424b"), "m-3.5-3.7h7l-7 7.4h7z"
    ),
}
PAGE = {  # (light, dark)
    "card": ("#ffffff", "#14181d"),
    "edge": ("#d9dee4", "#343c45"),
    "line": ("#c3cad2", "#48525d"),
    "ink": ("#1b1f24", "#e9eef3"),
    "muted": ("#545d68", "#a3adb8"),
}


def _palette(scope: str, theme: int) -> str:
    """CSS rules of one theme (0 light, 1 dark) for pictures inside `scope`."""
    page = {name: colours[theme] for name, colours in PAGE.items()}
    rules = [
        f"{scope}{{color:{page['muted']}}}",
        f"{scope} .lm-card{{fill:{page['card']};stroke:{page['edge']}}}",
        f"{scope} text,{scope} text.lm-w{{fill:{page['ink']}}}",
        f"{scope} .lm-m,{scope} .lm-u{{fill:{page['muted']}}}",
        f"{scope} .lm-idle text,{scope} text.lm-idle{{fill:{page['muted']}}}",
        f"{scope} .lm-l{{stroke:{page['line']}}}",
        f"{scope} .lm-h,{scope} text{{stroke:{page['card']}}}",
        f"{scope} .lm-v{{stroke:{page['ink']}}}",
    ]
    for tone, look in LOOKS.items():
        border, fill = (look.light, look.dark)[theme]
        rules.append(f"{scope} .lm-{tone}{{color:{border};fill:{fill}}}")
        rules.append(f"{scope} .lm-{tone} text,{scope} text.lm-{tone}{{stroke:{fill}}}")
    return "".join(rules)


SANS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif'
MONO = 'ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace'
SHAPES = (
    f".lm text{{font:13px {SANS}}}.lm .lm-c{{font-family:{MONO}}}"
    # the halo keeps text readable where an arrow passes under it
    ".lm text{paint-order:stroke;stroke-width:3px;stroke-linejoin:round}"
    ".lm .lm-n{font-size:11px}.lm .lm-u{font-size:13px;font-weight:400}"
    ".lm .lm-t{font-weight:600}.lm .lm-s{font-size:12px}.lm .lm-b{font-size:21px;font-weight:600}"
    ".lm .lm-w{text-anchor:middle;pointer-events:none}"
    ".lm .lm-f{stroke:currentColor;stroke-width:1.5}"
    ".lm .lm-g{fill:currentColor;fill-rule:evenodd;stroke:none}"
    ".lm .lm-l,.lm .lm-h,.lm .lm-v,.lm .lm-a{fill:none}"
    ".lm .lm-a{stroke:currentColor;stroke-width:1.6}.lm .lm-h{stroke-width:4.5;opacity:.85}"
    ".lm .lm-v{stroke-width:2}"
) + "".join(f".lm .lm-{tone} .lm-f{{{look.border}}}" for tone, look in LOOKS.items() if look.border)

# Alone, a picture follows the reader's system; inside a player the page's theme decides.
ALONE_CSS = (
    SHAPES + _palette(".lm", 0) + f"@media (prefers-color-scheme:dark){{{_palette('.lm', 1)}}}"
)
PLAYER_CSS = SHAPES + _palette(".lm-light .lm", 0) + _palette(".lm-dark .lm", 1)
