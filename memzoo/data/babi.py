"""bAbI-style stories (Weston et al. 2015, tasks 1 to 5) whose facts are scattered in prose, as BABILong does (Kuratov et al. 2024).

The stories are generated here: people walk between rooms, pick things up, drop them and hand them over.

- `babi_long_qa1`: where is a person? One fact answers.
- `babi_long_qa2`: where is a thing? Who holds it, and where they are.
- `babi_long_qa3`: where was a thing before it came to a room? Three facts.
- `babi_long_qa4`: what lies in a direction of a room? One fact of two that name it.
- `babi_long_qa5`: who gave what to whom? One fact, told apart from others with the same names.
"""

from __future__ import annotations

import numpy as np

from .fit import fill
from .haystack import Haystack

__all__ = ["TASKS", "make_babi", "make_story", "score_label"]

PEOPLE = ("Mary", "John", "Sandra", "Daniel", "Fred", "Julie", "Bill", "Emily")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk", "lamp")
WALKS = ("moved to", "went to", "walked to", "travelled to")
TAKES = ("picked up", "took", "got")
DROPS = ("dropped", "put down", "left")
GIVES = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

TASKS = ("babi_long_qa1", "babi_long_qa2", "babi_long_qa3", "babi_long_qa4", "babi_long_qa5")
HEADER = (
    "Some sentences about people, rooms and things are hidden in the text below. Find them and answer the question at the end with one "
    "word: {labels}."
)


def make_story(task: str, rng: np.random.Generator, facts: int | None = None) -> tuple[list[str], str, str, tuple[str, ...]]:
    """(facts in order, question, answer, labels there are) of a story; `facts` is the most sentences a story has (2 for qa4)."""
    if task not in TASKS:
        raise ValueError(f"unknown story {task!r}, needs one of {', '.join(TASKS)}")
    if facts is not None and facts < 5 and task != "babi_long_qa4":
        raise ValueError(f"{task}: facts is {facts}, needs at least 5")
    make = {"1": _where_person, "2": _where_thing, "3": _where_before, "4": _direction, "5": _giving}[task[-1]]
    return make(rng, facts)


def _pick(rng: np.random.Generator, choices):
    return choices[rng.integers(len(choices))]


def _walk(rng: np.random.Generator, person: str, room: str) -> str:
    return f"{person} {_pick(rng, WALKS)} the {room}."


def _elsewhere(rng: np.random.Generator, *rooms: str | None) -> str:
    return _pick(rng, [room for room in ROOMS if room not in rooms])


def _where_person(rng, facts):
    people, at, story = PEOPLE[:4], {}, []
    for _ in range(facts or 8):
        person = _pick(rng, people)
        at[person] = _elsewhere(rng, at.get(person))
        story.append(_walk(rng, person, at[person]))
    person = _pick(rng, sorted(at))
    return story, f"Where is {person}?", at[person], ROOMS


def _wander(rng, facts):
    """A story of walking, taking and dropping, and for each thing the rooms it was in, in order."""
    people = PEOPLE[:3]
    at, holder, path, story = {}, {}, {thing: [] for thing in THINGS}, []
    while len(story) < facts:
        person = _pick(rng, people)
        held = [thing for thing in THINGS if holder.get(thing) == person]
        # What lies in a room can be taken there; a thing that was nowhere yet can be found anywhere.
        free = [thing for thing in THINGS if holder.get(thing) is None and (not path[thing] or path[thing][-1] == at.get(person))]
        act = rng.random()
        if person in at and act < 0.3 and free and not held:
            thing = _pick(rng, free)
            holder[thing] = person
            if not path[thing]:
                path[thing].append(at[person])
            story.append(f"{person} {_pick(rng, TAKES)} the {thing}.")
        elif act < 0.45 and held:
            holder[held[0]] = None
            story.append(f"{person} {_pick(rng, DROPS)} the {held[0]}.")
        else:
            at[person] = _elsewhere(rng, at.get(person))
            for thing in held:
                path[thing].append(at[person])
            story.append(_walk(rng, person, at[person]))
    return story, path


def _where_thing(rng, facts):
    while True:
        story, path = _wander(rng, facts or 12)
        known = [thing for thing in THINGS if path[thing]]
        if known:
            thing = _pick(rng, known)
            return story, f"Where is the {thing}?", path[thing][-1], ROOMS


def _where_before(rng, facts):
    while True:
        story, path = _wander(rng, facts or 16)
        known = [thing for thing in THINGS if len(path[thing]) > 1 and path[thing].count(path[thing][-1]) == 1]
        if known:
            thing = _pick(rng, known)
            return story, f"Where was the {thing} before the {path[thing][-1]}?", path[thing][-2], ROOMS


def _direction(rng, facts):
    first, middle, last = (ROOMS[i] for i in rng.permutation(len(ROOMS))[:3])
    direction = _pick(rng, sorted(OPPOSITE))
    # `first` lies in one direction of `middle`, and `middle` in the same direction of `last`.
    story = [f"The {first} is {direction} of the {middle}.", f"The {middle} is {direction} of the {last}."]
    if rng.random() < 0.5:
        story.reverse()
    if rng.random() < 0.5:
        return story, f"What is {direction} of the {middle}?", first, ROOMS
    return story, f"What is the {middle} {direction} of?", last, ROOMS


def _giving(rng, facts):
    people, story, given = PEOPLE[4:] + PEOPLE[:1], [], []
    for _ in range(facts or 8):
        if given and rng.random() < 0.3:
            story.append(_walk(rng, _pick(rng, people), _pick(rng, ROOMS)))
            continue
        giver, taker = (people[i] for i in rng.permutation(len(people))[:2])
        thing = _pick(rng, THINGS)
        given.append((giver, thing, taker))
        story.append(f"{giver} {_pick(rng, GIVES)} the {thing} to {taker}.")
    # Asked for is what the story answers in one way only.
    questions = []
    for giver, thing, taker in given:
        if sum((g, t) == (giver, taker) for g, _, t in given) == 1:
            questions.append((f"What did {giver} give to {taker}?", thing))
        if sum((x, t) == (thing, taker) for _, x, t in given) == 1:
            questions.append((f"Who gave the {thing} to {taker}?", giver))
        if sum((g, x) == (giver, thing) for g, x, _ in given) == 1:
            questions.append((f"Who did {giver} give the {thing} to?", taker))
    if not questions:
        return _giving(rng, facts)
    question, answer = _pick(rng, questions)
    return story, question, answer, THINGS if question.startswith("What") else people


def make_babi(
    task: str,
    tokenizer,
    length: int,
    rng: np.random.Generator,
    *,
    facts: int | None = None,
    split: str = "test",
    answer_tokens: int = 8,
) -> dict:
    """One story in prose: its facts in order, at random ends of sentences.

    Args:
        task: a name in TASKS.
        length: tokens of prompt, prefix and answer together.
        facts: sentences of the story; 8, 12, 16, 2 and 8 for qa1 to qa5 if None. Fewer are easier.
        split: which part of the prose.

    Returns:
        input, gen_prefix, outputs (the answer), labels (what could be answered), facts, length, tokens.

    Raises:
        DoesNotFit: in one line, with the shortest length that works.
    """
    story, question, answer, labels = make_story(task, rng, facts)
    haystack = Haystack.of("essay", split, tokenizer)
    start = haystack.draw(rng)
    depths = np.sort(rng.random(len(story))).tolist()
    head, prefix = HEADER.format(labels=", ".join(labels)), "Answer:"

    def build(units: int, tail: str) -> tuple[str, str]:
        # Facts that share the end of a sentence keep their order: `text` sorts by place only.
        places = [(haystack.place(start, units, depth), fact) for depth, fact in zip(depths, story)]
        return f"{head}\n{haystack.text(start, units, places, tail)}\nQuestion: {question}", prefix

    def following(units: int, tokens: int) -> str:
        return haystack.following(start, units, tokens)

    def guess(tokens: int) -> int:
        return haystack.units_within(start, tokens)

    return {
        **fill(task, build, following, tokenizer, length, answer_tokens, guess=guess, frame="story"),
        "outputs": [answer],
        "labels": list(labels),
        "facts": story,
        "chance": 1.0 / len(labels),
    }


def score_label(sample: dict, answer: str) -> float:
    """1.0 if the first line of the answer names the right label and no other one, else 0.0; case does not matter."""
    said = answer.strip().lower().split("\n")[0]
    named = {label.lower() for label in sample["labels"] if label.lower() in said}
    return float(named == {sample["outputs"][0].lower()})
