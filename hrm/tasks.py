"""Problems whose depth is known: how many steps, each on the result of the last, lead to an answer of one word.

No steps are written out, so a model has to take them inside.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hrm.settings import UsageError, nearest

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Questions(NamedTuple):
    """A text, and all that can be asked about it."""

    text: str
    asked: list[tuple[str, str, int]]  # question, answer, depth


Make = Callable[[random.Random, int, range], Questions]  # generator, objects, depths


def object_swaps(draw: random.Random, objects: int, depths: range) -> Questions:
    """Which object is at a place after some swaps of two places."""
    row, depth = list(LETTERS[:objects]), draw.choice(depths)
    draw.shuffle(row)
    text = " ".join(row) + "."
    for _ in range(depth):
        one, other = draw.sample(range(objects), 2)
        row[one], row[other] = row[other], row[one]
        text += f" {one + 1} {other + 1},"
    return Questions(text, [(f" at {place + 1}?", row[place], depth) for place in range(objects)])


def pointer_chase(draw: random.Random, objects: int, depths: range) -> Questions:
    """Where some steps along the arrows lead. They go round all objects, so that fewer steps than objects never come
    back and the number of steps alone tells nothing. `depth` steps are also objects - depth steps back: with twice as
    many objects as steps that is no shorter way."""
    order = list(LETTERS[:objects])
    draw.shuffle(order)
    pairs = [(order[at - 1], order[at]) for at in range(objects)]
    draw.shuffle(pairs)
    asked = [
        (f" {depth} from {order[place]}?", order[(place + depth) % objects], depth)
        for depth in depths
        for place in range(objects)
    ]
    return Questions(" ".join(f"{a} {b}," for a, b in pairs), asked)


TASKS: dict[str, Make] = {"object_swaps": object_swaps, "pointer_chase": pointer_chase}
OPTIONS = {
    "object_swaps": {"objects": 5, "min_depth": 1, "max_depth": 10, "questions": 1},
    "pointer_chase": {"objects": 21, "min_depth": 1, "max_depth": 10, "questions": 1},
}


def texts(task: str, options: Mapping[str, Any], seed: int, key: str = "data.task_options") -> Iterator[Questions]:
    """Texts of `TASKS[task]` with some of their questions, drawn, without end; a function of task, options and seed.

    Depths are drawn evenly.

    Args:
        options: objects (2 to 26), min_depth and max_depth (from 0; for pointer_chase below objects), questions (1 to
            as many as can be asked about a text); what is missing is as in `OPTIONS`.
        key: what the options are called where one of them makes no sense.

    Raises:
        UsageError: an option that there is not, or a value that makes no sense.
    """
    objects, depths, count = _checked(task, options, key)
    draw = random.Random(f"{task}-{seed}")
    while True:
        text, asked = TASKS[task](draw, objects, depths)
        if count > len(asked):
            raise UsageError(f"{key}.questions is {count}; it should be from 1 to {len(asked)}, all about a text")
        yield Questions(text, draw.sample(asked, count))


def _checked(task: str, options: Mapping[str, Any], key: str) -> tuple[int, range, int]:
    own = OPTIONS[task]
    unknown = [name for name in options if name not in own]
    if unknown:
        raise UsageError(f"{key} has no {unknown[0]!r}{nearest(unknown[0], own)}")
    chosen = {**own, **options}
    objects, least, most, questions = (chosen[name] for name in own)
    for name, value in chosen.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"{key}.{name} is {value!r}; it should be a whole number")
    if not 2 <= objects <= len(LETTERS):
        raise UsageError(f"{key}.objects is {objects}; it should be from 2 to {len(LETTERS)}")
    if not 0 <= least <= most:
        raise UsageError(f"{key}.min_depth is {least}; it should be from 0 to max_depth = {most}")
    if task == "pointer_chase" and most >= objects:
        raise UsageError(
            f"{key}.max_depth is {most}; it should be below objects = {objects}, where the arrows come back"
        )
    if questions < 1:
        raise UsageError(f"{key}.questions is {questions}; it should be at least 1")
    return objects, range(least, most + 1), questions
