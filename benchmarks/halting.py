"""Segments used against accuracy and time, on a trained run's held-out problems: `python benchmarks/halting.py RUN`.

Decodes them greedily with exactly 1, 2, ... segments, as many as the run may use, and with halting by token,
`--repeats` times in turn; one line each: right answers, mean segments a token, seconds (the best time). Halting pays
where its line is as right as a deeper one and quicker.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from hrm.data import bad_row_of, load_problems
from hrm.evaluate import Depth, answer
from hrm.generate import find_checkpoint, load_trained
from hrm.settings import TrainingSettings
from hrm.train import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    settings: Any = OmegaConf.merge(OmegaConf.structured(TrainingSettings), OmegaConf.load(options.run / "config.yaml"))
    checkpoint, template = find_checkpoint(options.run)
    tokenizer, model = load_tokenizer(str(checkpoint)), load_trained(checkpoint)
    problems = load_problems(settings.data, settings.train.seed, bad_row_of(settings.data))
    texts = [template.question(example.prompt) for example in problems.held_out]
    ways: list[int | None] = [*range(1, model.hrm.config.max_segments + 1), None]
    best: dict[int | None, float] = {}
    for _ in range(options.repeats):
        for segments in ways:
            answers, started = [], time.perf_counter()
            with Depth(model) as depth:
                for start in range(0, len(texts), options.batch_size):
                    answers += answer(
                        model, tokenizer, texts[start : start + options.batch_size],
                        max_new_tokens=options.max_new_tokens, one_line=problems.one_line, segments=segments,
                    )  # fmt: skip
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            best[segments] = min(best.get(segments, seconds), seconds)
            right = sum(problems.score(a, e) == 1 for a, e in zip(answers, problems.held_out, strict=True))
            line = {"segments": segments or "halting", "right": right, "of": len(texts), "mean": round(depth.mean, 3)}
            print(json.dumps({**line, "seconds": round(best[segments], 2)}), flush=True)


if __name__ == "__main__":
    main()
