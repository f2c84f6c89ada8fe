"""Problems whose depth is known: how many steps, each on the result of the last, lead to an answer of one word.

No steps are written out, so a model has to take them inside.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hrm.settings import UsageError, nearest

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Make = Callable[[random.Random, int, int], tuple[str, str]]  # generator, objects, depth -> prompt, answer


def object_swaps(draw: random.Random, objects: int, depth: int) -> tuple[str, str]:
    """Which object is at a place after `depth` swaps of two places."""
    row = list(LETTERS[:objects])
    draw.shuffle(row)
    prompt = " ".join(row) + "."
    for _ in range(depth):
        one, other = draw.sample(range(objects), 2)
        row[one], row[other] = row[other], row[one]
        prompt += f" {one + 1} {other + 1},"
    place = draw.randrange(objects)
    return f"{prompt} at {place + 1}?", row[place]


def pointer_chase(draw: random.Random, objects: int, depth: int) -> tuple[str, str]:
    """Where `depth` steps along the arrows lead. They go round all objects, so that fewer steps than objects never come
    back and the number of steps alone tells nothing. `depth` steps are also objects - depth steps back: with twice as
    many objects as steps that is no shorter way."""
    order = list(LETTERS[:objects])
    draw.shuffle(order)
    place = draw.randrange(objects)
    pairs = [(order[at - 1], order[at]) for at in range(objects)]
    draw.shuffle(pairs)
    question = f"{depth} from {order[place]}?"
    return " ".join(f"{a} {b}," for a, b in pairs) + f" {question}", order[(place + depth) % objects]


TASKS: dict[str, Make] = {"object_swaps": object_swaps, "pointer_chase": pointer_chase}
OPTIONS = {
    "object_swaps": {"objects": 5, "min_depth": 1, "max_depth": 10},
    "pointer_chase": {"objects": 21, "min_depth": 1, "max_depth": 10},
}


def problems(
    task: str, options: Mapping[str, Any], seed: int, key: str = "data.task_options"
) -> Iterator[tuple[str, str, int]]:
    """Prompt, answer and depth of problems of `TASKS[task]`, without end; a function of task, options and seed.

    Depths are drawn evenly.

    Args:
        options: objects (2 to 26), min_depth and max_depth (from 0; for pointer_chase below objects); what is missing
            is as in `OPTIONS`.
        key: what the options are called where one of them makes no sense.

    Raises:
        UsageError: an option that there is not, or a value that makes no sense.
    """
    own = OPTIONS[task]
    unknown = [name for name in options if name not in own]
    if unknown:
        raise UsageError(f"{key} has no {unknown[0]!r}{nearest(unknown[0], own)}")
    chosen = {**own, **options}
    objects, least, most = (chosen[name] for name in own)
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
    draw = random.Random(f"{task}-{seed}")
    while True:
        depth = draw.randint(least, most)
        yield (*TASKS[task](draw, objects, depth), depth)
