"""Questions and answers: from JSONL, a Hugging Face data set or reasoning-gym, into batches of token ids."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hrm.modeling import IGNORED
from hrm.settings import UsageError, nearest
from hrm.tasks import TASKS, texts

logger = logging.getLogger("hrm")


class Example(NamedTuple):
    """One question with its answer."""

    prompt: str
    answer: str
    source: str  # where it stands, for messages: "file.jsonl:3"
    entry: Mapping[str, Any] = {}  # what reasoning-gym's scorer wants to see; {"depth": n} in `hrm.tasks`
    turns: tuple[tuple[str, str], ...] = ()  # further questions and answers about the same text, for training alone


Score = Callable[[str, Example], float]
BadRow = Callable[[str], None]
"""Told what is wrong with a row, and where; raises, or lets the row be passed over."""


def refuse(problem: str) -> None:
    """The strict `BadRow`: a UsageError."""
    raise UsageError(problem)


def exact_match(answer: str, example: Example) -> float:
    """1 where `answer` is the example's, white space around it aside; else 0."""
    return float(answer.strip() == example.answer.strip())


def bad_row_of(data: Any) -> BadRow:
    """The one that data.bad_rows asks for: `refuse`, or one that warns."""
    return refuse if data.bad_rows == "error" else lambda problem: logger.warning("row passed over: %s", problem)


@dataclass(frozen=True)
class Problems:
    """What is trained on and what is only evaluated on; no prompt is in both."""

    train: list[Example]
    held_out: list[Example]
    score: Score = exact_match

    @property
    def one_line(self) -> bool:
        """Whether no answer goes over a line's end, so that decoding may stop there."""
        return not any("\n" in example.answer.strip() for example in [*self.train, *self.held_out])


# ---------------------------------------------------------------------------------------------------- where from


def load_problems(data: Any, seed: int, bad_row: BadRow = refuse) -> Problems:
    """The problems that the `data` section asks for.

    Args:
        bad_row: hears of each row that cannot be used.

    Raises:
        UsageError: none or several of data.path, data.dataset and data.task are given; or what they name is not there
            or not as it should be (for a file the message has name and line).
    """
    given = [name for name in ("path", "dataset", "task") if data[name] is not None]
    if len(given) != 1:
        was = " and ".join(f"data.{name}" for name in given) or "none"
        raise UsageError(f"{was} given; it should be one of data.path, data.dataset and data.task")
    if data.task in TASKS:
        return _of_known_depth(data, seed)
    if data.task is not None:
        return _from_task(data, seed)
    if data.dataset is not None:
        return hold_out(read_dataset(data, bad_row), data.held_out, seed)
    rows = read_jsonl(Path(data.path), data.prompt_column, data.answer_column, bad_row)
    if data.held_out_path is None:
        return hold_out(rows, data.held_out, seed)
    held_out = read_jsonl(Path(data.held_out_path), data.prompt_column, data.answer_column, bad_row)
    return Problems(_without(rows, held_out, data.path), held_out)


def read_jsonl(
    path: Path, prompt_column: str = "prompt", answer_column: str = "answer", bad_row: BadRow = refuse
) -> list[Example]:
    """One example a line; empty lines are passed over, as is what `bad_row` lets pass: a line that is no JSON object
    with two texts, of which it hears with file and line number.

    Raises:
        UsageError: no such file, or no rows.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file")
    examples = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            source = f"{path}:{number}"
            with _telling(bad_row):
                examples.append(_example(_parse(line, source), prompt_column, answer_column, source))
    if not examples:
        raise UsageError(f"{path} has no rows")
    return examples


def read_dataset(data: Any, bad_row: BadRow = refuse) -> list[Example]:
    """The rows of a Hugging Face data set; the rest as in `read_jsonl`, with the number of the row."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError('data.dataset needs the package datasets; pip install "hrm-kernels[data]"') from error
    try:
        rows = load_dataset(data.dataset, data.subset, split=data.split)
    except (ValueError, OSError) as error:
        raise UsageError(f"data.dataset {data.dataset!r}: {first_line(error)}") from error
    examples = []
    for number, row in enumerate(rows):
        source = f"{data.dataset}[{data.split}]:{number}"
        with _telling(bad_row):
            examples.append(_example(row, data.prompt_column, data.answer_column, source))
    if not examples:
        raise UsageError(f"data.dataset {data.dataset!r} has no rows in the split {data.split!r}")
    return examples


def hold_out(examples: Sequence[Example], count: int, seed: int) -> Problems:
    """Sets `count` distinct prompts aside, drawn by `seed`, at most a tenth of the rows and at least one."""
    distinct = list({example.prompt: example for example in examples}.values())
    random.Random(seed).shuffle(distinct)
    held_out = distinct[: max(1, min(count, len(distinct) // 10))]
    return Problems(_without(examples, held_out, examples[0].source.rpartition(":")[0]), held_out)


def _of_known_depth(data: Any, seed: int) -> Problems:
    """Problems of `hrm.tasks`; `data.held_out_options` replace options for the held-out ones, which have one turn."""

    def made(options: dict[str, Any], seed: int, key: str, held_out: Container[str] = ()) -> Iterator[Example | None]:
        for number, (text, asked) in enumerate(texts(data.task, options, seed, key)):
            (question, answer, depth), *later = asked
            turns = tuple(turn[:2] for turn in later)
            seen = any(text + turn[0] in held_out for turn in asked)
            yield None if seen else Example(text + question, answer, f"{data.task}:{number}", {"depth": depth}, turns)

    options, other = dict(data.task_options), dict(data.held_out_options)
    if other.get("questions", 1) != 1:
        raise UsageError(
            f"data.held_out_options.questions is {other['questions']!r}; it should be 1: each is judged by one answer"
        )
    next(made(options, seed, "data.task_options"))  # what is wrong with them is not the held-out options' fault
    others = made({**options, "questions": 1, **other}, seed + 1, "data.held_out_options")
    held_out = _enough(others, data.held_out, data.task)
    train = made(options, seed, "data.task_options", {example.prompt for example in held_out})
    return Problems(_enough(train, data.size, data.task), held_out)


def _enough(examples: Iterator[Example | None], count: int, task: str) -> list[Example]:
    """The first `count` different ones; None: one that may not be used."""
    drawn = (example for example in islice(examples, 20 * count + 1000) if example is not None)
    found = list(islice(_distinct(drawn), count))
    if len(found) < count:
        raise UsageError(
            f"{task} gave {len(found)} different problems; it should give {count}. Widen data.task_options."
        )
    return found


def _from_task(data: Any, seed: int) -> Problems:
    if data.held_out_options:
        raise UsageError(f"data.held_out_options is given; it should be empty but for data.task={' or '.join(TASKS)}")
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UsageError('data.task needs the package reasoning-gym; pip install "hrm-kernels[demo]"') from error
    if data.task not in DATASETS:
        known = [*TASKS, *DATASETS]
        raise UsageError(f"data.task is {data.task!r}, no task of reasoning-gym or ours{nearest(data.task, known)}")
    total = data.size + data.held_out
    try:
        gym = reasoning_gym.create_dataset(data.task, seed=seed, size=2 * total, **dict(data.task_options))
    except (TypeError, AssertionError, ValueError) as error:
        raise UsageError(f"data.task_options of {data.task}: {first_line(error)}") from error
    distinct = list(islice(_distinct(_entries(gym, data.task)), total))
    if len(distinct) <= data.held_out:
        raise UsageError(
            f"{data.task} gave {len(distinct)} different problems; it should give more than data.held_out = "
            f"{data.held_out}. Widen data.task_options or hold out fewer."
        )
    return Problems(
        distinct[data.held_out :],
        distinct[: data.held_out],
        lambda answer, example: gym.score_answer(answer, dict(example.entry)),
    )


def _entries(gym: Any, task: str) -> Iterator[Example]:
    for number in range(len(gym)):
        entry = gym[number]
        if entry["answer"] is not None:
            yield Example(entry["question"].strip(), str(entry["answer"]), f"{task}:{number}", entry)


def _distinct(examples: Iterable[Example]) -> Iterator[Example]:
    seen: set[str] = set()
    for example in examples:
        if example.prompt not in seen:
            seen.add(example.prompt)
            yield example


def _without(examples: Sequence[Example], held_out: Sequence[Example], source: str) -> list[Example]:
    prompts = {example.prompt for example in held_out}
    left = [example for example in examples if example.prompt not in prompts]
    if not left:
        raise UsageError(f"{source} has no prompt to train on that is not held out; it should have at least one")
    return left


@contextmanager
def _telling(bad_row: BadRow) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        bad_row(str(error))


def _parse(line: bytes, source: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{source}: no valid JSON ({error.msg} at column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: no valid UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
        raise UsageError(f"{source}: cannot be read as JSON ({first_line(error)})") from error


def _example(row: Any, prompt_column: str, answer_column: str, source: str) -> Example:
    if not isinstance(row, Mapping):
        raise UsageError(f"{source}: is {type(row).__name__}; it should be an object with {prompt_column!r}")
    for column in (prompt_column, answer_column):
        if column not in row:
            raise UsageError(f"{source}: no {column!r}; it has {', '.join(map(repr, row)) or 'no keys'}")
        if not isinstance(row[column], str):
            raise UsageError(f"{source}: {column!r} is {type(row[column]).__name__}; it should be text")
        if not _is_text(row[column]):
            raise UsageError(f"{source}: {column!r} holds half of a surrogate pair, such as \\ud83d; it should be text")
    if not row[answer_column].strip():
        raise UsageError(f"{source}: {answer_column!r} is empty; it should be text")
    return Example(row[prompt_column], row[answer_column], source)


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8, which JSON's escapes do not ensure and tokenizers ask for."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---------------------------------------------------------------------------------------------------- into tokens


class Template:
    """How a prompt and an answer become one text: "Question: {prompt}\\nAnswer: {answer}".

    White space in front of {answer} goes with the answer: tokenizers such as Gemma's keep a space with the word that
    follows it.
    """

    def __init__(self, text: str) -> None:
        head, prompt, rest = text.partition("{prompt}")
        middle, answer, tail = rest.partition("{answer}")
        if not prompt or not answer or "{prompt}" in rest or "{answer}" in head + tail:
            raise UsageError(f"data.template is {text!r}; it should hold {{prompt}} once and {{answer}} once after it")
        stem = middle.rstrip(" ")
        self._head, self._middle, self._space, self._tail = head, stem, middle[len(stem) :], tail

    def question(self, prompt: str) -> str:
        """The text that the model is to go on from."""
        return self._head + prompt + self._middle

    def later_question(self, prompt: str) -> str:
        """The same for one that follows others, and begins with the space that parts it from a text."""
        return "\n" + self.question(prompt.lstrip()) if self._head else self.question(prompt)

    def answer(self, answer: str) -> str:
        """The text that is learnt."""
        return self._space + answer + self._tail

    def shots(self, examples: Sequence[Example]) -> str:
        """Solved examples to stand in front of a question."""
        return "".join(f"{self.question(e.prompt)}{self.answer(e.answer)}\n\n" for e in examples)


class Encoded(NamedTuple):
    """Token ids of one example."""

    prompt: list[int]
    answer: list[int]  # ends with the end-of-text token
    beside: tuple[tuple[int, int], ...] = ()  # places in the prompt where an earlier question has ended, and the token
    # that answers it there: it is learnt and stands nowhere in the text, where later questions could make use of it

    @property
    def tokens(self) -> list[int]:
        """The whole row."""
        return [*self.prompt, *self.answer]

    @property
    def labels(self) -> list[int]:
        """What is to follow the token before each place, where that is learnt, else -100."""
        labels = [*([IGNORED] * len(self.prompt)), *self.answer]
        for place, token in self.beside:
            labels[place] = token
        return labels


class Row(Protocol):
    """What a batch is made of."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def labels(self) -> list[int]: ...


def encode(
    examples: Sequence[Example],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    bad_row: BadRow = refuse,
) -> list[Encoded]:
    """Token ids of each example; `bad_row` hears of one that has more than `max_length`, or none to go on from.

    Where there are further questions, the last one's answer stands in the text and those before it beside.

    Raises:
        UsageError: the tokenizer cannot end a text, no example is left, or answers that should stand beside a text are
            not told apart by their first token.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError("the backbone's tokenizer has no end-of-text token; it should have one to end answers with")
    prompts = tokenizer([template.question(e.prompt) for e in examples])["input_ids"]
    answers = tokenizer([template.answer(e.answer) for e in examples], add_special_tokens=False)["input_ids"]
    later, encoded = _turns(examples, template, tokenizer), []
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        if not prompt:
            bad_row(f"{example.source}: the prompt has no tokens; it should have at least one to go on from")
            continue
        row = _joined(Encoded(prompt, [*answer, tokenizer.eos_token_id]), [later[turn] for turn in example.turns])
        if len(row.tokens) <= max_length:
            encoded.append(row)
        else:
            bad_row(
                f"{example.source}: prompt and answer have {len(row.prompt)} + {len(row.answer)} tokens; "
                f"they should have at most data.max_length = {max_length}"
            )
    if not encoded:
        raise UsageError("none of the rows can be used")
    return encoded


def _turns(
    examples: Sequence[Example], template: Template, tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[str, str], Encoded]:
    """Token ids of all further questions and their answers, so that nothing is put in front of them."""
    turns = list({turn: None for example in examples for turn in example.turns})
    if not turns:
        return {}
    _check_first_tokens(
        {a for e in examples if e.turns for a in (e.answer, *(turn[1] for turn in e.turns))}, template, tokenizer
    )
    questions = tokenizer([template.later_question(q) for q, _ in turns], add_special_tokens=False)["input_ids"]
    answers = tokenizer([template.answer(a) for _, a in turns], add_special_tokens=False)["input_ids"]
    ended = ([*answer, tokenizer.eos_token_id] for answer in answers)
    return dict(zip(turns, map(Encoded, questions, ended), strict=True))


def _check_first_tokens(answers: Collection[str], template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """One place beside a text holds one token."""
    firsts: dict[int, str] = {}
    for answer in sorted(answers):
        first = tokenizer(template.answer(answer), add_special_tokens=False)["input_ids"][0]
        if first in firsts:
            raise UsageError(
                f"the answers {firsts[first]!r} and {answer!r} begin with the same token, which cannot stand for both; "
                "data.task_options.questions should be 1 with this tokenizer and data.template"
            )
        firsts[first] = answer


def _joined(first: Encoded, later: Sequence[Encoded]) -> Encoded:
    """One row of a text and its questions: all answers but the last stand beside."""
    prompt, beside, answer = list(first.prompt), list[tuple[int, int]](), first.answer
    for turn in later:
        beside.append((len(prompt), answer[0]))
        prompt += turn.prompt
        answer = turn.answer
    return Encoded(prompt, answer, tuple(beside))


class Batch(NamedTuple):
    """One training step's rows, padded on the right."""

    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S) int64, 1 for real tokens
    labels: Tensor  # (B, S) int64, -100 everywhere but at the answer


def collate(rows: Sequence[Row], pad: int) -> Batch:
    """Rows of different lengths as one batch; only answers are scored."""
    width = max(len(row.tokens) for row in rows)
    batch = Batch(*(torch.full((len(rows), width), fill) for fill in (pad, 0, IGNORED)))
    for index, row in enumerate(rows):
        tokens = row.tokens
        length = len(tokens)
        batch.input_ids[index, :length] = torch.tensor(tokens)
        batch.attention_mask[index, :length] = 1
        batch.labels[index, :length] = torch.tensor(row.labels)
    return batch


def batches(rows: Sequence[Encoded], batch_size: int, pad: int, seed: int) -> Iterator[Batch]:
    """Batches without end, each pass over `rows` in a new order drawn from `seed`; batches cross from pass to pass."""
    order = _shuffled_forever(len(rows), random.Random(seed))
    while True:
        yield collate([rows[index] for index in islice(order, batch_size)], pad)


def _shuffled_forever(count: int, generator: random.Random) -> Iterator[int]:
    while True:
        yield from generator.sample(range(count), count)
