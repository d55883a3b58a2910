"""The Player's Python side: what it sends, what it stores, what it refuses."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("anywidget", reason="the player needs anywidget; GPU test machines lack it")

import llmopt_lab.widgets
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import Record, Trace, record, recording
from llmopt_lab.widgets.listing import list_source
from llmopt_lab.widgets.panels import Bar, Bars, Cell, Frame, Grid, Meter
from llmopt_lab.widgets.player import MAX_STATE, Player, compare


@dataclass(frozen=True)
class Took(Record):
    """Some blocks were taken."""

    n_blocks: int

    def __str__(self) -> str:
        return f"take {self.n_blocks} blocks"


def take_all(counts):
    for n_blocks in counts:
        record(Took(n_blocks))


def frames(trace: Trace) -> list[Frame]:
    """One frame a step, as a chapter's view makes them."""
    return [
        Frame(str(s.what), (Meter("taken", s.what.n_blocks, "blocks"),), s.file, s.line, s.index)
        for s in trace.steps
    ]


def trace_of(*counts: int) -> Trace:
    with recording() as trace:
        take_all(counts)
    return trace


def pictures(player: Player, side: str = "frames") -> list[str]:
    return ["".join(player.pieces[i] for i in f["svg"]) for f in getattr(player, side)]


def test_every_frame_is_sent_as_a_picture_with_caption_and_line():
    trace = trace_of(1, 2, 3)
    player = Player(frames(trace))
    assert [f["caption"] for f in player.frames] == [str(s.what) for s in trace.steps]
    assert [f["line"] for f in player.frames] == [s.line for s in trace.steps]
    for n_blocks, svg in enumerate(pictures(player), 1):
        assert f">{n_blocks}<" in svg
        ET.fromstring(svg)


def test_the_source_beside_the_picture_is_the_function_that_recorded():
    player = Player(frames(trace_of(1, 2)))
    (listing,) = player.listings
    assert listing["title"] == "take_all in tests/test_widgets_player.py"
    assert listing["lines"][0] == "def take_all(counts):"
    line = player.frames[0]["line"] - listing["first"]
    assert listing["lines"][line].strip() == "record(Took(n_blocks))"


def test_nothing_sent_to_the_page_names_a_folder_of_this_machine():
    sent = json.dumps(Player(frames(trace_of(1))).get_state(["frames", "listings", "pieces"]))
    assert str(Path(__file__).parents[1]) not in sent


def test_a_frame_without_readable_source_has_no_listing():
    frame = Frame("c", (Meter("m", 1, ""),), file="/nowhere/to/be/found.py", line=3)
    player = Player([frame, Frame("c", (Meter("m", 1, ""),))])
    assert [f["listing"] for f in player.frames] == [None, None]
    assert player.listings == []


def test_no_frames_is_refused_with_what_to_do():
    with pytest.raises(BadInput, match="recording"):
        Player([])
    with pytest.raises(BadInput, match="versus is empty"):
        Player(frames(trace_of(1)), [])


@pytest.mark.parametrize("start", [-1, 3])
def test_a_start_outside_the_frames_is_refused(start):
    with pytest.raises(BadInput, match="numbered 0 to 2"):
        Player(frames(trace_of(1, 2, 3)), start=start)


def test_the_position_can_be_set_and_watched_and_stays_inside():
    player = Player(frames(trace_of(1, 2, 3)), start=1)
    seen = []
    player.observe(lambda change: seen.append(change["new"]), "position")
    player.position = 2
    assert seen == [2]
    with pytest.raises(BadInput, match="position is 3"):
        player.position = 3
    assert player.position == 2


def block_tables(step: int) -> Frame:
    def cell(row: int, column: int) -> Cell:
        mine = column < step % 17
        return Cell(str((row * 16 + column) % 99), f"owner{row}" if mine else "idle")

    rows = tuple(tuple(cell(r, c) for c in range(16)) for r in range(8))
    return Frame(f"step {step} of a long run", (Grid("tables", tuple("ABCDEFGH"), rows),))


def test_two_hundred_frames_of_real_block_tables_fit():
    player = Player([block_tables(step) for step in range(200)])
    state = player.get_state(["frames", "versus", "pieces", "listings"])
    assert len(player.frames) == 200
    assert len(json.dumps(state).encode()) < 0.6 * MAX_STATE


def test_more_than_one_mebibyte_is_refused_with_the_numbers():
    noise = [
        Frame(f"{i}", tuple(Bars(f"{i}-{j}", (Bar(f"{i * j}", i * j),) * 20) for j in range(9)))
        for i in range(99)
    ]
    with pytest.raises(BadInput, match=r"99 frames take [\d,]+ bytes.*1,048,576.*fewer frames"):
        Player(noise)


def html_of(widget) -> str:
    bundle = widget._repr_mimebundle_()
    return (bundle[0] if isinstance(bundle, tuple) else bundle)["text/html"]


def test_the_stored_output_is_a_picture_that_needs_no_script():
    html = html_of(Player(frames(trace_of(1, 2, 42)), title="Taking <blocks>"))
    assert "<script" not in html and "<style" not in html
    assert "Taking &lt;blocks&gt;" in html
    root = ET.fromstring(f"<div>{html}</div>")
    (image,) = root.iter("img")
    assert image.get("alt") == "take 42 blocks"
    svg = base64.b64decode(image.get("src").removeprefix("data:image/svg+xml;base64,"))
    assert ">42<" in svg.decode() and "prefers-color-scheme:dark" in svg.decode()
    ET.fromstring(svg)
    assert [item.text for item in root.iter("li")] == [f"take {n} blocks" for n in (1, 2, 42)]


def test_a_player_opened_at_a_step_stores_the_picture_of_that_step():
    html = html_of(Player(frames(trace_of(1, 2, 3)), start=1))
    assert "Step 2 of 3. take 2 blocks" in html


def test_the_bundle_offers_the_live_widget_first_and_a_steady_text():
    def bundle():
        data = Player(frames(trace_of(5, 6)))._repr_mimebundle_()
        return data[0] if isinstance(data, tuple) else data

    assert "application/vnd.jupyter.widget-view+json" in bundle()
    assert bundle()["text/plain"] == "Player(step 1 of 2: take 5 blocks)"
    assert bundle()["text/html"] == bundle()["text/html"]
    assert Player._ipython_display_ is None  # ipywidgets 7 would show its own and lose the bundle


def test_the_metadata_of_the_bundle_is_kept_for_colab(monkeypatch):
    import anywidget

    metadata = {"application/vnd.jupyter.widget-view+json": {"colab": {"custom_widget_manager": 1}}}
    monkeypatch.setattr(
        anywidget.AnyWidget, "_repr_mimebundle_", lambda self, **kw: ({"x": 1}, metadata)
    )
    data, kept = Player(frames(trace_of(1)))._repr_mimebundle_()
    assert kept == metadata and data["x"] == 1


def test_two_runs_are_opened_where_they_part():
    player = compare(trace_of(1, 2, 3, 4), trace_of(1, 2, 9, 4), frames)
    assert player.position == 2
    assert player.note == ("First difference: expected: take 3 blocks; yours: take 9 blocks")
    assert player.labels == ["reference", "yours"]
    assert player.frames[2]["caption"] == "take 3 blocks"
    assert player.versus[2]["caption"] == "take 9 blocks"
    both = pictures(player) + pictures(player, "versus")
    assert len({ET.fromstring(svg).get("width") for svg in both}) == 1


def test_a_view_that_skips_steps_opens_at_the_frame_that_shows_the_parting():
    def every_second(trace):
        return frames(trace)[1::2]

    player = compare(trace_of(1, 2, 3, 4, 5, 6), trace_of(1, 2, 9, 4, 5, 6), every_second)
    assert player.position == 1  # steps 1, 3, 5 are shown; step 2 shows in the frame of step 3


def test_a_view_without_step_numbers_opens_at_the_first_frame_that_looks_different():
    def unnumbered(trace):
        return [Frame(f.caption, f.panels) for f in frames(trace)]

    assert compare(trace_of(1, 2, 3), trace_of(1, 9, 3), unnumbered).position == 1
    assert compare(trace_of(1, 2, 3), trace_of(1, 2), unnumbered).position == 2


def test_a_run_that_ended_early_holds_its_last_frame():
    player = compare(trace_of(1, 2, 3), trace_of(1, 2), frames)
    assert player.position == 2
    assert "your run is already over" in player.note
    assert repr(player) == "Player(step 3 of 3: take 3 blocks | take 2 blocks)"
    assert "yours: take 2 blocks" in html_of(player)


def test_a_run_that_went_on_too_long_is_opened_at_its_first_extra_step():
    player = compare(trace_of(1, 2), trace_of(1, 2, 3), frames)
    assert player.position == 2 and "the reference is done" in player.note


def test_equal_runs_say_so():
    assert compare(trace_of(1, 2), trace_of(1, 2), frames).note == "No difference in 2 steps."


def test_a_run_that_recorded_nothing_is_refused_by_name():
    with pytest.raises(BadInput, match="'yours' recorded nothing"):
        compare(trace_of(1), Trace(), frames)


def test_a_listing_names_the_class_and_keeps_decorators(tmp_path):
    file = tmp_path / "room.py"
    file.write_text(
        "import functools\n\nclass Pool:\n    @functools.cache\n    def take(self):\n"
        "        if self:\n            return 1\n        try:\n            pass\n"
        "        except ValueError:\n            return 2\n\nx = [\n  1,\n]\n"
    )
    for line in (4, 5, 7, 11):
        listing = list_source(str(file), line)
        assert listing.title.startswith("Pool.take in ")
        assert listing.first == 4
        assert listing.lines[:2] == ("@functools.cache", "def take(self):")
        assert listing.lines[-1] == "        return 2"
    assert list_source(str(file), 14).lines == ("x = [", "  1,", "]")
    assert list_source(str(file), 99) is None


def test_a_file_that_is_not_python_has_no_listing(tmp_path):
    file = tmp_path / "cell.py"
    file.write_text("%%bash\necho hello\n")
    assert list_source(str(file), 2) is None


def test_a_function_of_a_notebook_cell_is_listed():
    import linecache

    name = "/somewhere/ipykernel_77/3141592.py"
    source = "def attend(q):\n    return q\n"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    listing = list_source(name, 2)
    assert listing.title == "attend in this notebook"
    assert listing.lines == ("def attend(q):", "    return q")


def test_the_page_draws_nothing_itself():
    source = Path(llmopt_lab.widgets.__path__[0], "player.js").read_text()
    assert not re.search(r"createElementNS|<rect|<circle|<text|getContext", source)
