"""Choose what a class does in the minutes it has, and when.

The order of importance is the course's own. Round 0 takes chapter after chapter: its core (the
sections before its exercises, and the last, which sums up) and its first two exercises, as many
as fit. Each later round offers every chapter that is in one section and one exercise more. What
something needs is taken with it, or it is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmopt_lab.core.errors import require
from llmopt_lab.workshop.course import START, Chapter, Place, Section

DAY = 480  # minutes of work; lunch comes on top
AT_A_STRETCH = 90  # minutes without a break, at most, unless one section takes longer
BREAK = 10
EXERCISES_FIRST = 2


@dataclass(frozen=True)
class Item:
    """One line of the agenda. `section` is None for a break."""

    start: int  # minutes from the beginning of day 1; day 2 begins at DAY
    minutes: int
    section: Section | None = None

    @property
    def end(self) -> int:
        return self.start + self.minutes


@dataclass(frozen=True)
class Agenda:
    """What is done when, and of which chapters."""

    minutes: int  # that there are
    items: tuple[Item, ...]
    chapters: tuple[Chapter, ...]

    @property
    def sections(self) -> list[Section]:
        return [item.section for item in self.items if item.section is not None]

    def chosen(self, notebook: str, exercises: bool = False) -> list[Section]:
        """What of one lesson, or of its exercises, is on the agenda, by number."""
        mine = [s for s in self.sections if s.notebook == notebook and bool(s.points) == exercises]
        return sorted(mine, key=lambda s: s.number)


def plan(course: Sequence[Chapter], minutes: int, rooms: Sequence[str] = ()) -> Agenda:
    """An agenda of at most `minutes`, breaks included.

    Args:
        course: all chapters, in order.
        minutes: of work, lunch not counted.
        rooms: only these chapters ("moe"), and what they need; all of them if empty.

    Raises:
        BadInput: a room that there is not, or too little time for the first chapter's core.
    """
    known = {chapter.name.partition("_")[2]: chapter for chapter in course}
    start = known.pop(START.partition("_")[2], None)
    for room in rooms:
        require(room in known, f"there is no chapter {room!r}; there are: {', '.join(known)}")
    wanted = [chapter for room, chapter in known.items() if not rooms or room in rooms]
    chosen: set[Section] = set(start.core) if start else set()
    taken = []
    for chapter in wanted:
        core = _with_needs(chosen | set(chapter.core), course)
        if _schedule(core, course, minutes) is None:
            continue
        chosen = core
        taken.append(chapter)
        for exercise in chapter.exercises[:EXERCISES_FIRST]:
            chosen = _with(exercise, chosen, course, minutes)
    least = sum(s.minutes for s in _with_needs(chosen | set(wanted[0].core), course))
    require(
        bool(taken),
        f"{minutes} minutes are too few: {wanted[0].title} takes {least} with the introduction",
    )
    rest = [_by_turns(c.sections, c.exercises[EXERCISES_FIRST:], c.after) for c in taken]
    if start:
        rest.append(list(start.sections))
    for offers in _rounds(rest):
        chosen = _with(offers, chosen, course, minutes)
    return Agenda(minutes, _schedule(chosen, course, minutes), tuple(course))


def _with(section: Section, chosen: set[Section], course, minutes: int) -> set[Section]:
    """`chosen`, and `section` with what it needs if there is time for them."""
    more = _with_needs(chosen | {section}, course)
    return chosen if _schedule(more, course, minutes) is None else more


def _by_turns(sections: Sequence[Section], exercises: Sequence[Section], after: int) -> list:
    """The section after the core, an exercise, the next section, the next exercise ..."""
    offers, rest = [], list(exercises)
    for section in sections[after:-1]:
        offers += [section, *rest[:1]]
        rest = rest[1:]
    return offers + rest


def _rounds(lists: Sequence[list]) -> list:
    """The first of each list, then the second of each ..."""
    longest = max(map(len, lists), default=0)
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def _with_needs(sections: set[Section], course: Sequence[Chapter]) -> set[Section]:
    places = {s.place: s for chapter in course for s in chapter.sections}
    todo, found = list(sections), set(sections)
    while todo:
        for place in todo.pop().needs:
            require(
                place in places,
                f"section {place[1]} of {place[0]} is needed, and there is no such section",
            )
            if places[place] not in found:
                found.add(places[place])
                todo.append(places[place])
    return found


def _schedule(sections: set[Section], course: Sequence[Chapter], minutes: int):
    """The agenda's items, with breaks; None if they take more than `minutes`."""
    items: list[Item] = []
    now, since_break = 0, 0
    for section in _in_order(sections, course):
        day_ends = (now // DAY + 1) * DAY
        if now and (now % DAY == 0 or now + section.minutes > day_ends >= DAY):
            now, since_break = -(-now // DAY) * DAY, 0
        elif since_break and since_break + section.minutes > AT_A_STRETCH:
            items.append(Item(now, BREAK))
            now, since_break = now + BREAK, 0
            if now + section.minutes > day_ends:
                items.pop()
                now = day_ends
        items.append(Item(now, section.minutes, section))
        now, since_break = now + section.minutes, since_break + section.minutes
    return tuple(items) if now <= minutes else None


def _in_order(sections: set[Section], course: Sequence[Chapter]) -> list[Section]:
    """Chapter by chapter; an exercise follows the last section it needs; a chapter's last section
    comes last. The introduction's last section, where to go, closes the whole."""
    ordered: list[Section] = []
    closing: list[Section] = []
    taught: set[Place] = set()
    for chapter in course:
        *lesson, last = chapter.sections
        waiting = [task for task in chapter.exercises if task in sections]
        for section in lesson:
            if section in sections:
                ordered.append(section)
                taught.add(section.place)
                ordered += [task for task in waiting if task.needs <= taught]
                waiting = [task for task in waiting if not task.needs <= taught]
        if last in sections:
            (closing if chapter.name == START else ordered).append(last)
            taught.add(last.place)
        ordered += waiting
    return ordered + closing


def where(place: Place, course: Sequence[Chapter]) -> str:
    """A place in words: "section 3 of 1. Paged attention"."""
    title = next(chapter.title for chapter in course if chapter.name == place[0])
    return f"section {place[1]} of {title}"
