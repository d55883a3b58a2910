"""Widgets as plain data, for pages without a kernel: `keep` runs in the kernel of an export.

After `keep()`, a displayed Player carries its frames, and an Explore the frames of every position
of its sliders, in the output's MIME bundle.
"""

import itertools
import json

from llmopt_lab.core.errors import LabError
from llmopt_lab.widgets.explore import Explore
from llmopt_lab.widgets.player import Player

MIME = "application/x-llmopt-frames+json"
MAX_POSITIONS = 60  # of one Explore's sliders together
MAX_BYTES = 3 << 20  # of one Explore; positions beyond are said to be missing
SENT = ("frames", "versus", "labels", "position", "title", "note")


def keep() -> None:
    """Let every Player and Explore of this session carry its frames."""
    for kind, data_of in ((Player, player_data), (Explore, explore_data)):
        kind._repr_mimebundle_ = _carrying(kind._repr_mimebundle_, data_of)


def _carrying(original, data_of):
    def bundle(self, **kwargs):
        data, metadata = original(self, **kwargs)
        return {**data, MIME: data_of(self)}, metadata

    return bundle


def player_data(player: Player) -> dict:
    """What player.js asks its model for, and nothing else."""
    return _with_pools([_state(player)], [])


def explore_data(explore: Explore) -> dict:
    """The sliders, and for each position of them a player's state or the sentence of a refusal."""
    sliders = [
        {
            "label": slider.label,
            "options": slider.options,
            "index": slider.index,
        }
        for slider in explore.sliders.values()
    ]
    start = tuple(slider["index"] for slider in sliders)
    positions = itertools.product(*(range(len(slider["options"])) for slider in sliders))
    nearest = sorted(
        positions, key=lambda p: sum(abs(a - b) for a, b in zip(p, start, strict=True))
    )
    states, where, n_bytes = [], [], 0
    for position in nearest[:MAX_POSITIONS]:
        state = _state_at(explore, position)
        n_bytes += len(json.dumps(state))
        if states and n_bytes > MAX_BYTES:
            break
        states.append(state)
        where.append(",".join(map(str, position)))
    return _with_pools(states, sliders) | {"positions": where}


def _state_at(explore: Explore, position: tuple[int, ...]) -> dict:
    places = zip(explore.sliders.items(), position, strict=True)
    values = {name: slider.values[index] for (name, slider), index in places}
    try:
        return _state(explore.make(**values))
    except LabError as refused:
        return {"problem": str(refused)}


def _state(player: Player) -> dict:
    """A player's state with its pieces and listings in place of their numbers."""
    state = {name: getattr(player, name) for name in SENT}
    for side in ("frames", "versus"):
        state[side] = [
            {
                **frame,
                "svg": [player.pieces[i] for i in frame["svg"]],
                "listing": None
                if frame["listing"] is None
                else json.dumps(player.listings[frame["listing"]]),
            }
            for frame in state[side]
        ]
    return state


def _with_pools(states: list[dict], sliders: list[dict]) -> dict:
    """Equal pieces and listings of all states are stored once."""
    pieces: dict[str, int] = {}
    listings: dict[str, int] = {}
    for state in states:
        for frame in (*state.get("frames", ()), *state.get("versus", ())):
            frame["svg"] = [pieces.setdefault(piece, len(pieces)) for piece in frame["svg"]]
            if frame["listing"] is not None:
                frame["listing"] = listings.setdefault(frame["listing"], len(listings))
    return {
        "sliders": sliders,
        "states": states,
        "pieces": list(pieces),
        "listings": [json.loads(text) for text in listings],
    }
