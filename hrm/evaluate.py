"""Greedy answers to held-out problems, and how many of them are right."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from hrm.data import Batch, Example, Problems, Row, Template, collate
from hrm.loss import IGNORED
from hrm.modeling import HRMGemmaForCausalLM
from hrm.runs import read_lines
from hrm.sharding import is_sharded


@dataclass(frozen=True)
class Evaluation:
    """Answers to some problems, in their order."""

    examples: Sequence[Example]
    answers: list[str]
    scores: list[float]

    @property
    def right(self) -> int:
        """Problems with full score."""
        return sum(score == 1 for score in self.scores)

    @property
    def accuracy(self) -> float:
        """Share of problems with full score."""
        return self.right / len(self.scores)

    def by_depth(self) -> dict[int, float]:
        """Share of full scores by the problems' depth, where they have one (`hrm.tasks`)."""
        scores: dict[int, list[bool]] = {}
        for example, score in zip(self.examples, self.scores, strict=True):
            if "depth" in example.entry:
                scores.setdefault(example.entry["depth"], []).append(score == 1)
        return {depth: sum(right) / len(right) for depth, right in sorted(scores.items())}

    @classmethod
    def read(cls, path: Path, examples: Sequence[Example]) -> Evaluation | None:
        """What `write` wrote of the same problems; None where that is not there."""
        rows = read_lines(path)
        if [row.get("prompt") for row in rows] != [example.prompt for example in examples]:
            return None
        return cls(examples, [row["answer"] for row in rows], [row["score"] for row in rows])

    def write(self, path: Path) -> None:
        """One JSON object a problem: prompt, expected, answer, score."""
        with path.open("w", encoding="utf-8") as file:
            for example, answer, score in zip(self.examples, self.answers, self.scores, strict=True):
                row = {"prompt": example.prompt, "expected": example.answer, "answer": answer, "score": score}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Depth:
    """Counts, while it is entered, how many segments the core ran for each token that it saw."""

    def __init__(self, model: HRMGemmaForCausalLM) -> None:
        self._model = model
        self._segments, self._tokens = 0, 0

    def __enter__(self) -> Depth:
        self._hook = self._model.hrm.register_forward_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, core: object, inputs: object, output: Any) -> None:
        self._segments += int(output.segments_used.sum())
        self._tokens += int((output.segments_used > 0).sum())

    @property
    def mean(self) -> float:
        """Segments a token."""
        return self._segments / max(1, self._tokens)


@torch.no_grad()
def predict(
    model: HRMGemmaForCausalLM,
    rows: Sequence[Row],
    pad: int,
    *,
    batch_size: int,
    segments: int | None = None,
) -> list[bool]:
    """Whether greedy decoding would give each row's answer, from one forward pass over prompt and answer.

    The same as decoding it, since no token sees a later one: up to its first mistake decoding sees what stands here.

    Args:
        rows: with their answers, which end with the end-of-text token.
        segments: run exactly so many; None: as the model's config says.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].tokens))
    right, was_training = [False] * len(rows), model.training
    model.eval()
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        batch = Batch(*(tensor.to(model.device) for tensor in collate([rows[row] for row in part], pad)))
        targets = batch.labels[:, 1:]
        kept = (targets != IGNORED).any(0).nonzero().squeeze(1)  # logits elsewhere would be most of the memory
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model(batch.input_ids, batch.attention_mask, segments=segments, logits_to_keep=kept).logits
        same = (logits.argmax(-1) == targets[:, kept]) | (targets[:, kept] == IGNORED)
        for row, correct in zip(part, same.all(1).tolist(), strict=True):
            right[row] = correct
    model.train(was_training)
    return right


def evaluate(
    model: HRMGemmaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    template: Template,
    *,
    batch_size: int,
    max_new_tokens: int,
    shots: int = 0,
) -> Evaluation:
    """Answers the held-out problems greedily, after `shots` solved training examples, and scores the answers."""
    examples, front = problems.held_out, template.shots(problems.train[:shots])
    answers: list[str] = []
    for start in range(0, len(examples), batch_size):
        texts = [front + template.question(e.prompt) for e in examples[start : start + batch_size]]
        answers += answer(model, tokenizer, texts, max_new_tokens=max_new_tokens, one_line=problems.one_line)
    return Evaluation(examples, answers, [problems.score(a, e) for a, e in zip(answers, examples, strict=True)])


def commonest_answer(problems: Problems) -> Evaluation:
    """What giving the training problems' commonest answer to every held-out problem would get: the floor to beat."""
    examples, count = problems.held_out, Counter(example.answer for example in problems.train)
    guess = count.most_common(1)[0][0]
    return Evaluation(examples, [guess] * len(examples), [problems.score(guess, example) for example in examples])


@torch.no_grad()
def answer(
    model: HRMGemmaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    one_line: bool = False,
    **generation: Any,
) -> list[str]:
    """What the model writes after each of `texts`, without white space around it; padded on the left, in one batch.

    Where FSDP2 has cut up the model, every process has to call this as often as the others.

    Args:
        max_new_tokens: longest answer.
        one_line: stop at the end of the first line that is not empty.
        generation: passed to `generate`; the default is greedy.
    """
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    width = inputs["input_ids"].shape[1]
    was_training, sharded = model.training, is_sharded(model)
    model.eval()
    # not under FSDP2: what weights are gathered into would be of no use outside of inference mode
    inference = torch.inference_mode(not sharded)
    with inference, torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        ids = model.generate(  # type: ignore[misc]  # its protocol has a class variable that models leave out
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=sharded,  # all gather weights in each forward pass: who ends its rows earlier has to go on
            stopping_criteria=StoppingCriteriaList([_LineEnd(tokenizer, width)] if one_line else []),
            **{"do_sample": False, **generation},
        )
    model.train(was_training)
    answers = [text.strip() for text in tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)]
    return [text.partition("\n")[0].rstrip() for text in answers] if one_line else answers


class _LineEnd(StoppingCriteria):
    """Stops each row by itself once it has written a line that is not empty."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_width: int) -> None:
        self._tokenizer, self._prompt_width = tokenizer, prompt_width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        written = self._tokenizer.batch_decode(input_ids[:, self._prompt_width :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in written], device=input_ids.device)
