"""Sliders over a Player: each value makes its own run, an impossible one is said in words."""

import pytest

from llmopt_lab.core.errors import BadInput, LabError
from llmopt_lab.widgets.explore import VIEW, Choice, Explore
from llmopt_lab.widgets.panels import Frame, Meter
from llmopt_lab.widgets.player import Player
from llmopt_lab.widgets.slider import Slider

made: list[int] = []


def make(n: int) -> Player:
    made.append(n)
    if n > 4:
        raise BadInput(f"the pool has {n} blocks; got <too many>")
    return Player([Frame(f"{i} of {n}", (Meter("blocks", i, "blocks", n),)) for i in range(n)])


@pytest.fixture
def explore() -> Explore:
    made.clear()
    return Explore(make, n=Choice("blocks", (1, 2, 4, 8), 2))


def slide(explore: Explore, value: int) -> None:
    explore.children[0].value = value


def test_a_slider_makes_the_run_of_its_value(explore):
    slide(explore, 4)
    assert explore.values == {"n": 4}
    assert len(explore.shown.frames) == 4


def test_what_was_made_is_kept(explore):
    for value in (4, 2, 4, 2):
        slide(explore, value)
    assert made == [2, 4]


def test_an_impossible_value_is_said_in_words_and_can_be_left_again(explore):
    slide(explore, 8)
    assert "the pool has 8 blocks; got &lt;too many&gt;" in explore.shown.value
    assert 'role="alert"' in explore.shown.value
    slide(explore, 1)
    assert isinstance(explore.shown, Player)


def test_without_a_kernel_the_first_picture_stands(explore):
    data, _ = explore._repr_mimebundle_()
    assert data[VIEW]["model_id"] == explore.model_id
    assert "data:image/svg+xml" in data["text/html"]
    assert data["text/plain"] == "Explore(n=2: Player(step 1 of 2: 0 of 2))"
    slide(explore, 8)
    assert repr(explore) == "Explore(n=8: not possible)"


def test_bad_choices_are_refused():
    with pytest.raises(BadInput, match="needs at least one slider"):
        Explore(make)
    with pytest.raises(BadInput, match="n starts at 3, which is not among"):
        Explore(make, n=Choice("blocks", (1, 2), 3))
    with pytest.raises(LabError, match="the pool has 8 blocks"):
        Explore(make, n=Choice("blocks", (8,), 8))


def test_a_slider_has_a_name_says_its_values_and_keeps_inside_them():
    slider = Slider("blocks", (1, 2, None), 2)
    assert (slider.label, slider.options, slider.index) == ("blocks", ["1", "2", "None"], 1)
    slider.value = None
    assert slider.index == 2 and repr(slider) == "Slider(blocks: None)"
    with pytest.raises(BadInput, match="5 is not among"):
        slider.value = 5
    with pytest.raises(BadInput, match="index is 3, not 0 to 2"):
        slider.index = 3
    assert slider.value is None
