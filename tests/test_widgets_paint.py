"""A mask to paint: what it keeps and costs, what it sends, what stands without a kernel."""

import json
import re

import pytest
import torch

pytest.importorskip("anywidget", reason="widgets need anywidget; GPU test machines lack it")

from llmopt_lab.core.errors import BadInput
from llmopt_lab.widgets.paint import Cost, Paint

ALLOWED = torch.ones(3, 3).tril().bool()
SHARES = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.005, 0.495]])
CELLS = torch.tensor([[10, 20, 30]] * 3)


def paint(**changes):
    arguments = {
        "shares": {"head 0": SHARES, "head 1": torch.eye(3)},
        "costs": [Cost("K and V", "bytes", CELLS, 100)],
        "allowed": ALLOWED,
        "presets": {"own block": torch.eye(3).bool(), "all": ALLOWED},
        "row_labels": ["0", "2", "4"],
        "column_labels": ["0", "2", "4"],
    } | changes
    return Paint(arguments.pop("shares"), arguments.pop("costs"), **arguments)


def test_what_is_kept_and_spent_are_sums_over_what_is_painted():
    mask = paint()
    assert mask.painted == [0, 4, 8] and torch.equal(mask.mask, torch.eye(3).bool())
    assert mask.kept_by_row() == [1, 0.75, 0.495]
    assert mask.kept() == pytest.approx((1 + 0.75 + 0.495) / 3)
    assert mask.spent() == {"K and V": (100 + 60, 100 + 100)}
    mask.painted = [8, 6, 0]
    assert mask.painted == [0, 6, 8]
    assert mask.kept_by_row() == [1, 0, 0.995]
    assert mask.spent()["K and V"] == (100 + 50, 200)
    mask.shown = 1
    assert mask.kept_by_row() == [1, 0, 1]


def test_the_caption_tells_it_all():
    assert paint().caption() == (
        "head 0: 3 of 6 blocks read, 74.8% of the attention kept. K and V: 80.0% of dense. "
        "Row q 4 keeps least, 49.5%."
    )
    assert repr(paint()) == f"Paint({paint().caption()})"


def test_every_state_has_a_name_and_a_tone():
    grid = paint().frame().panels[0]
    assert [cell.tone for cell in grid.rows[1]] == ["bad", "good", "idle"]
    assert [cell.tone for cell in grid.rows[2]] == ["bad", "cached", "good"]
    assert [cell.text for cell in grid.rows[2]] == ["50", "", "50"]
    assert grid.rows[2][0].note == (
        "queries 4, keys 0: not read, 1% of its row or more; 50.0% of the row's attention"
    )
    assert grid.rows[0][2].note == "queries 0, keys 4: may not be seen"


def test_without_a_kernel_a_picture_stands():
    bundle = paint(title="Paint it")._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["text/html"].startswith("<p><strong>Paint it</strong></p><figure")
    assert 'src="data:image/svg+xml;base64,' in data["text/html"]
    assert "K and V: 160 of 200" in data["text/html"]
    assert data["text/plain"] == repr(paint())


def test_python_answers_the_page_and_a_failure_is_said_in_words():
    def count(mask):
        if mask.sum() > 3:
            raise BadInput("too many")
        return f"{int(mask.sum())} blocks" if mask.any() else 1 / 0

    mask = paint(ask=count)
    mask.set_state({"painted": [0, 3], "asked": 1})
    assert mask.answer == {"n": 1, "text": "2 blocks"}
    mask.set_state({"painted": [0, 3, 4, 6], "asked": 2})
    assert mask.answer == {"n": 2, "text": "too many"}
    mask.set_state({"painted": [], "asked": 3})
    assert mask.answer["n"] == 3 and mask.answer["text"].startswith("ZeroDivisionError")
    assert paint().ask_label == ""


def test_what_is_sent_stays_small():
    shares = {f"head {i}": SHARES[:1].expand(24, 3).repeat(1, 8) / 8 for i in range(40)}
    labels = [str(i) for i in range(24)]
    mask = paint(
        shares=shares, costs=[], allowed=torch.ones(24, 24).bool(), row_labels=labels,
        column_labels=labels, presets={"none": torch.zeros(24, 24).bool()},
    )  # fmt: skip
    state = {key: value for key, value in mask.get_state().items() if key not in ("_esm", "_css")}
    assert len(json.dumps(state)) < 1 << 20


def test_every_state_is_told_apart_in_both_themes():
    for theme in ("light", "dark"):
        for tone in ("good", "bad", "cached", "idle"):
            assert re.search(rf"\.lm-paint\.lm-{theme} \.lm-{tone}\{{--lm-tone:#", Paint._css)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shares": {}}, "one head at least"),
        ({"presets": {}}, "one preset at least"),
        ({"allowed": ALLOWED[:2]}, r"allowed must be \(3, 3\)"),
        ({"costs": [Cost("x", "", CELLS[:, :2])]}, r"cost 'x' must be \(3, 3\)"),
        ({"shares": {"a": SHARES / 2}}, "every row of share 'a' must sum to 1"),
        ({"shares": {"a": SHARES.flip(0)}}, "over what is allowed"),
        ({"presets": {"a": ~ALLOWED}}, "preset 'a' paints what is not allowed"),
    ],
)
def test_bad_input_is_refused(changes, says):
    with pytest.raises(BadInput, match=says):
        paint(**changes)


def test_a_refused_stroke_changes_nothing():
    mask = paint()
    for wrong in ([1], [-1], [9]):
        with pytest.raises(BadInput, match="cannot be painted"):
            mask.painted = wrong
    with pytest.raises(BadInput, match="shown must be 0 to 1"):
        mask.shown = 2
    assert mask.painted == [0, 4, 8] and mask.shown == 0
