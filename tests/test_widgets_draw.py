"""Frames as SVG, without a browser: well-formed, complete, steady, readable."""

import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_lab.core.errors import BadInput
from llmopt_lab.widgets.draw import describe, draw_frame, draw_series, number, visible
from llmopt_lab.widgets.looks import LOOKS, PAGE
from llmopt_lab.widgets.panels import (
    TONES,
    Arrows,
    Bar,
    Bars,
    Cell,
    Chart,
    Frame,
    Grid,
    Lanes,
    Line,
    Meter,
    Span,
    Token,
    Tokens,
)

SVG = "{http://www.w3.org/2000/svg}"
TABLE = Grid("block table", ("A", "B"), ((Cell("7", "owner0"), Cell()), (Cell("2", "shared"),)))
POOL = Grid("pool", (), (tuple(Cell(str(i)) for i in range(8)),), tuple("abcdefgh"))
PANELS = {
    "Grid": TABLE,
    "Bars": Bars("load", (Bar("expert 0", 3.5), Bar("expert 1", 0, "bad")), "tokens"),
    "Chart": Chart("error", (Line("RTN", ((0, 0), (4, 2.5))), Line("later", ())), "columns", "%"),
    "Lanes": Lanes("who runs", ("A",), ((Span(0, 4, "prefill"), Span(4, 9.5, "d")),), "ms", 5),
    "Meter": Meter("in use", 12, "blocks", 16),
    "Tokens": Tokens("text", (Token("The"), Token(" cat", "good", "accepted"), Token("\n"))),
}


def seen(svg: str) -> str:
    """Everything a picture says: its text, its titles and its label."""
    root = ET.fromstring(svg)
    return " ".join([root.get("aria-label"), *root.itertext()])


def drawn_text(svg: str) -> str:
    """The text in the picture itself, without titles, description and style."""
    root = ET.fromstring(svg)
    return " ".join(text for node in root.iter(f"{SVG}text") for text in node.itertext())


@pytest.mark.parametrize("kind", PANELS)
def test_every_kind_of_panel_is_drawn_with_its_title_and_the_same_text_twice(kind):
    frame = Frame(f"A {kind}.", (PANELS[kind],))
    svg = draw_frame(frame)
    assert svg == draw_frame(frame)
    assert ET.fromstring(svg).get("aria-label") == f"A {kind}."
    assert PANELS[kind].title in drawn_text(svg)


def test_a_grid_shows_every_cell_and_label():
    text = drawn_text(draw_frame(Frame("c", (TABLE, POOL)))).split()
    for word in ["A", "B", "7", "2", *"01234567", *"abcdefgh"]:
        assert word in text


def test_a_token_shows_its_leading_space_and_its_newline():
    text = drawn_text(draw_frame(Frame("c", (PANELS["Tokens"],))))
    assert "·cat" in text and "↵" in text


def test_each_outer_space_of_a_token_shows_and_inner_ones_stay():
    shown = {visible(text) for text in ("    ", "  a b ", "\t", "\r\n", "")}
    assert shown == {"····", "··a b·", "⇥", "↵", "∅"}


def test_a_token_with_a_line_end_is_the_last_of_its_line():
    texts = ("a", "\n", "    ", "b", "\n  ", "c")
    svg = draw_frame(Frame("c", (Tokens("text", tuple(Token(text) for text in texts)),)))
    boxes = [e for e in ET.fromstring(svg).iter(f"{SVG}rect")][1:]  # the first is the card
    y = [float(box.get("y")) for box in boxes]
    assert y[0] == y[1] < y[2] == y[3] == y[4] < y[5]
    assert boxes[0].get("x") == boxes[2].get("x") == boxes[5].get("x")


def test_a_meter_says_how_its_value_stands_to_the_other_one():
    def says(value, versus):
        return drawn_text(draw_frame(Frame("c", (Meter("m", value, "KiB", versus),))))

    assert "75% of 16" in says(12, 16)
    assert "3.2 × 512" in says(1638.4, 512)
    assert "against 0" in says(5, 0)
    assert "of" not in says(5, None)


def test_a_bar_is_as_long_as_its_value():
    bars = Bars("b", (Bar("x", 2), Bar("y", 8)), top=10)
    root = ET.fromstring(draw_frame(Frame("c", (bars,))))
    x, y = [float(r.get("width")) for r in root.iter(f"{SVG}rect") if r.get("height") == "22"]
    assert y == pytest.approx(4 * x, abs=0.5)  # coordinates have one decimal


def test_the_shaded_part_of_a_bar_lies_on_its_beginning_and_is_told():
    frame = Frame("c", (Bars("b", (Bar("x", 8, "good", shaded=2), Bar("y", 4))),))
    root = ET.fromstring(draw_frame(frame))
    boxes = [r for r in root.iter(f"{SVG}rect") if r.get("height") == "22"]
    whole, shade, other = boxes
    assert shade.get("class") == "lm-g" and shade.get("x") == whole.get("x")
    assert float(whole.get("width")) == pytest.approx(4 * float(shade.get("width")), abs=0.5)
    assert other.get("class") == "lm-f"
    assert "8, 2 of it shaded" in "".join(describe(frame))


def test_a_line_goes_through_its_points_and_its_label_stands_at_its_end():
    lines = Line("low", ((0, 0), (2, 5), (4, 5))), Line("cut", ((0, 10), (4, 40)), "bad")
    root = ET.fromstring(draw_frame(Frame("c", (Chart("t", lines, "columns", "%", top=10),))))
    paths = [p.get("d") for p in root.iter(f"{SVG}path") if p.get("class") == "lm-a"]
    (x0, y0), (x1, y1), (x2, y2) = [map(float, p.split()) for p in paths[0][1:].split("L")]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 == y2 < y0
    (_, top), (_, cut) = [map(float, p.split()) for p in paths[1][1:].split("L")]
    assert top == cut == pytest.approx(2 * y1 - y0, abs=0.2)
    words = {t.text: float(t.get("y")) for t in root.iter(f"{SVG}text")}
    assert words["low 5 %"] == pytest.approx(y2 + 4, abs=0.2)
    assert words["cut 40 %"] < words["low 5 %"]
    close = Line("a", ((0, 1),)), Line("b", ((0, 1.01),)), Line("c", ((0, 1.02),))
    root = ET.fromstring(draw_frame(Frame("c", (Chart("t", close),))))
    places = [
        float(t.get("y")) for t in root.iter(f"{SVG}text") if t.text[:2] in ("a ", "b ", "c ")
    ]
    assert [a - b for a, b in pairwise(places)] == pytest.approx([16, 16])


def test_heat_is_a_share_of_a_cell_s_strong_colour():
    def layers(heat):
        root = ET.fromstring(draw_frame(Frame("c", (Grid("g", (), ((Cell("x", heat=heat),),)),))))
        return [r.get("opacity") for r in root.iter(f"{SVG}rect") if r.get("opacity")]

    assert layers(0) == []
    assert layers(0.5) == ["0.25"] and layers(1) == ["0.50"]


def test_a_span_stands_where_its_times_say():
    lanes = Lanes("l", ("A",), ((Span(0, 2, tone="good"), Span(6, 8, tone="bad")),))
    root = ET.fromstring(draw_frame(Frame("c", (lanes,))))
    boxes = [r for r in root.iter(f"{SVG}rect") if r.get("height") == "28"]
    (x1, w1), (x2, w2) = [(float(b.get("x")), float(b.get("width"))) for b in boxes]
    unit = (w1 + 2) / 2
    assert w1 == pytest.approx(w2, abs=0.2)
    assert x2 - x1 == pytest.approx(6 * unit, abs=0.5)


@pytest.mark.parametrize("pool", [POOL, Grid("pool", (), ((Cell("x"),) * 2,) * 4)])
def test_an_arrow_ends_at_the_cell_it_points_to(pool):
    """Stacked under a wide grid, and beside a narrow one."""
    row, column = len(pool.rows) - 1, len(pool.rows[0]) - 1
    frame = Frame("c", (TABLE, pool, Arrows((((0, 0, 0), (1, row, column)),))))
    root = ET.fromstring(draw_frame(frame))
    groups = [g for g in root[-1].findall(f"{SVG}g") if g.get("transform")]
    dx, dy = map(float, re.findall(r"[\d.]+", groups[1].get("transform")))
    target = list(groups[1].iter(f"{SVG}rect"))[-1]
    left, top = dx + float(target.get("x")), dy + float(target.get("y"))
    right, bottom = left + float(target.get("width")), top + float(target.get("height"))
    (arrow,) = [g for g in root[-1].findall(f"{SVG}g") if len(g.findall(f"{SVG}path")) == 3]
    assert arrow.get("class") == "lm-owner0"  # the tone of the cell it starts from
    tip = re.match(r"M([\d.]+) ([\d.]+)", arrow.findall(f"{SVG}path")[2].get("d"))
    x, y = map(float, tip.groups())
    on_top_edge = abs(y - top) < 0.2 and left < x < right
    on_left_edge = abs(x - left) < 0.2 and top < y < bottom
    assert on_top_edge or on_left_edge


def test_an_arrow_back_starts_before_the_label_of_its_row():
    tokens = Grid("tokens", (), ((Cell("t0"),), (Cell("t1"),)))
    experts = Grid("experts", ("expert 0", "expert 1"), ((Cell("t0"),), (Cell("t1"),)))
    frame = Frame("c", (tokens, experts, Arrows((((1, 1, 0), (0, 0, 0)),))))
    root = ET.fromstring(draw_frame(frame))
    groups = [g for g in root[-1].findall(f"{SVG}g") if g.get("transform")]
    label = float(re.findall(r"[\d.]+", groups[1].get("transform"))[0])
    (arrow,) = [g for g in root[-1].findall(f"{SVG}g") if len(g.findall(f"{SVG}path")) == 3]
    start = re.match(r"M([\d.]+) ([\d.]+)", arrow.find(f"{SVG}path").get("d"))
    assert float(start[1]) == pytest.approx(label, abs=0.2)


def test_a_series_keeps_its_size_and_the_places_of_its_panels():
    def frame(n):
        table = Grid("t", ("long label" * n,), (tuple(Cell("12345"[:n]) for _ in range(n)),))
        return Frame(
            f"step {n}", (table, Tokens("text", tuple(Token("word") for _ in range(9 * n))))
        )

    series = ["".join(pieces) for pieces in draw_series([frame(n) for n in range(1, 5)])]
    sizes = {(root.get("width"), root.get("height")) for root in map(ET.fromstring, series)}
    places = {tuple(re.findall(r'<g transform="([^"]+)"', svg)) for svg in series}
    assert len(sizes) == 1
    assert len(places) == 1


def test_what_does_not_change_from_frame_to_frame_is_the_same_piece():
    rows = tuple(tuple(Cell(str(r * 8 + c)) for c in range(8)) for r in range(8))
    other = (*rows[:7], (Cell("x", "new"), *rows[7][1:]))
    first, second = draw_series([Frame("c", (Grid("g", (), r),)) for r in (rows, other)])
    changed = sum(len(piece) for piece in set(second) - set(first))
    assert changed < 0.3 * len("".join(second))


def test_long_text_is_clipped_and_kept_whole_in_a_title():
    long = "a very long label that cannot possibly fit into the width of a cell or a row"
    grid = Grid("g", (long,), ((Cell(long),),))
    frame = Frame(
        "c", (grid, Bars(long, (Bar(long, 1),)), Lanes("l", (long,), ((Span(0, 1, long),),)))
    )
    root = ET.fromstring(draw_frame(frame))
    for node in root.iter(f"{SVG}text"):
        if node.text.startswith("a very") and len(node.text) < len(long):
            assert node.text.endswith("…")
    assert [t.text for t in root.iter(f"{SVG}title")].count(long) >= 5


def test_markup_in_text_is_text():
    nasty = """<script>alert("x")</script> & ' ]]>"""
    svg = draw_frame(Frame(nasty, (Meter(nasty, 1, nasty), Grid(nasty, (), ((Cell("<"),),)))))
    assert ET.fromstring(svg).get("aria-label") == nasty
    assert "<script" not in svg


def test_what_xml_cannot_hold_is_replaced():
    svg = draw_frame(Frame("a\x00b\x1b[0m\ud800\uffff", (Tokens("t", (Token("\x07"),)),)))
    assert ET.fromstring(svg.encode()).get("aria-label") == "a\ufffdb\ufffd[0m\ufffd\ufffd"


def test_the_description_says_what_colours_say():
    legend = (("owner0", "request A"),)
    words = "".join(describe(Frame("c", (TABLE, PANELS["Bars"]), legend=legend)))
    assert "7 (request A)" in words and "2 (shared)" in words
    assert "expert 1 (wasted or wrong) 0 tokens" in words


def test_the_legend_names_the_tones_in_use_and_no_others():
    frame = Frame("c", (TABLE,), legend=(("owner0", "request A"),))
    text = drawn_text(draw_frame(frame))
    assert "request A" in text and "shared" in text
    assert "cached" not in text and "owner" not in text


@pytest.mark.parametrize(
    ("panel", "says"),
    [
        (Grid("g", (), ((Cell("x", "red"),),)), "no tone 'red'"),
        (Grid("g", ("a", "b"), ((Cell(),),)), "1 rows and 2 row labels"),
        (Bars("b", (Bar("x", float("nan")),)), "is nan"),
        (Bars("b", (Bar("x", -1),)), "cannot be negative"),
        (Bars("b", (Bar("x", 1, shaded=2),)), "so 0 to that can be shaded; got 2"),
        (Bars("b", (Bar("x", 1),), top=float("inf")), "is inf"),
        (Grid("g", (), ((Cell(heat=1.5),),)), "heat is a share, 0 to 1; got 1.5"),
        (Chart("t", (Line("x", ((0, -1),)),)), "negative y"),
        (Chart("t", (Line("x", ((float("nan"), 1),)),)), "is nan"),
        (Chart("t", (), top=float("inf")), "is inf"),
        (Lanes("l", ("a",), ()), "0 lanes and 1 labels"),
        (Lanes("l", ("a",), ((Span(3, 1, "s"),),)), "before its start"),
        (Lanes("l", ("a",), ((),), now=float("nan")), "now of Lanes"),
        (Meter("m", float("inf"), "B"), "is inf"),
        (Meter("m", 1, "B", float("nan")), "versus of Meter"),
        (Arrows((((0, 0, 0), (1, 9, 0)),)), "(1, 9, 0)"),
        (Arrows((((0, 1, 1), (1, 0, 0)),)), "(0, 1, 1)"),
    ],
)
def test_a_panel_that_cannot_be_drawn_is_refused_by_name(panel, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        draw_frame(Frame("c", (TABLE, POOL, panel)))


def test_a_frame_without_a_panel_is_refused():
    with pytest.raises(BadInput, match="no panel to draw"):
        draw_frame(Frame("c", (Arrows(()),)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (3.0, "3"),
        (0.12345, "0.123"),
        (1536.4, "1,536"),
        (1e20, "1e+20"),
    ],
)
def test_numbers_are_written_for_readers(value, text):
    assert number(value) == text


tones = st.sampled_from(TONES)
words = st.text(max_size=30)
finite = st.floats(-1e200, 1e200) | st.integers(-(10**9), 10**9)
positive = st.floats(0, 1e200) | st.integers(0, 10**9)
cells = st.builds(Cell, words, tones, words, st.floats(0, 1))
grids = st.lists(st.lists(cells, max_size=7).map(tuple), max_size=5).flatmap(
    lambda rows: st.builds(
        Grid,
        words,
        st.sampled_from([(), tuple(f"row {i}" for i in range(len(rows)))]),
        st.just(tuple(rows)),
        st.lists(words, max_size=5).map(tuple),
    )
)
spans = st.tuples(finite, finite, words, tones).map(
    lambda s: Span(min(s[0], s[1]), max(s[0], s[1]), s[2], s[3])
)
lanes = st.lists(st.tuples(words, st.lists(spans, max_size=4).map(tuple)), max_size=4).flatmap(
    lambda rows: st.builds(
        Lanes,
        words,
        st.just(tuple(label for label, _ in rows)),
        st.just(tuple(lane for _, lane in rows)),
        words,
        st.none() | finite,
    )
)
bars = st.builds(
    Bars,
    words,
    st.lists(st.builds(Bar, words, positive, tones), max_size=5).map(tuple),
    words,
    st.none() | finite,
)
charts = st.builds(
    Chart,
    words,
    st.lists(
        st.builds(
            Line, words, st.lists(st.tuples(finite, positive), max_size=20).map(tuple), tones
        ),
        max_size=4,
    ).map(tuple),
    words,
    words,
    st.none() | finite,
)
meters = st.builds(Meter, words, finite, words, st.none() | finite, tones)
tokens = st.builds(
    Tokens, words, st.lists(st.builds(Token, words, tones, words), max_size=12).map(tuple)
)
panels = st.lists(grids | lanes | bars | charts | meters | tokens, min_size=1, max_size=4).map(
    tuple
)
frames = st.builds(Frame, words, panels)


# beartype looks at random items of a tuple; the pictures do not depend on it
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(frames, min_size=1, max_size=3))
def test_whatever_the_panels_hold_the_picture_is_well_formed_and_finite(series):
    for frame, pieces in zip(series, draw_series(series), strict=True):
        svg = "".join(pieces)
        root = ET.fromstring(svg.encode())  # also refuses a lone surrogate
        shapes = ("x", "y", "width", "height", "rx", "d", "transform", "viewBox")
        for node in root.iter():
            for name in shapes:
                assert not re.search("nan|inf|e[+-]", node.get(name, ""))
            for name in ("width", "height"):
                assert float(node.get(name, "0")) >= 0
        said = re.sub(r"\s+", " ", " ".join(root.itertext()))
        for panel in frame.panels:
            expected = "".join(c for c in panel.title if c.isascii() and c.isprintable())
            if expected == panel.title:
                assert re.sub(r"\s+", " ", expected) in said


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_computed_as_wcag_does():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the usual example


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_borders_stand_out_in_both_themes(theme):
    page = {name: colours[theme] for name, colours in PAGE.items()}
    assert contrast(page["ink"], page["card"]) >= 7
    assert contrast(page["muted"], page["card"]) >= 4.5
    for tone, look in LOOKS.items():
        border, fill = (look.light, look.dark)[theme]
        text = page["muted"] if tone == "idle" else page["ink"]
        assert contrast(text, fill) >= 4.5, tone
        assert contrast(border, page["card"]) >= 3, tone
        if look.mark:
            assert contrast(border, fill) >= 3, tone


def test_every_tone_has_a_look_that_differs_without_colour():
    assert set(LOOKS) == set(TONES)
    for a, b in combinations(TONES, 2):
        assert (LOOKS[a].mark, LOOKS[a].border) != (LOOKS[b].mark, LOOKS[b].border), (a, b)
    for tone in TONES:
        svg = draw_frame(Frame("c", (Grid("g", (), ((Cell("x", tone),),)),)))
        marks = [p.get("d") for p in ET.fromstring(svg).iter(f"{SVG}path")]
        assert any(LOOKS[tone].mark in d for d in marks) or not LOOKS[tone].mark


def test_a_narrow_cell_still_shows_its_number():
    row = tuple(Cell(str(100 + i), "owner0") for i in range(40))
    text = drawn_text(draw_frame(Frame("c", (Grid("g", (), (row,)),)))).split()
    assert "100" in text and "139" in text


@pytest.mark.parametrize("times", [(0, 0), (0, 5e-324), (1e200, 1e200), (-3, -3), (7, 7 + 1e-14)])
def test_lanes_that_last_no_time_are_still_drawn(times):
    lanes = Lanes("l", ("A",), ((Span(*times, "blink"),),))
    ET.fromstring(draw_frame(Frame("c", (lanes,))))
