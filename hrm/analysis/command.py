"""`hrm analyse`: gradient and fixed point of a trained core, measured on its own training data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hrm.settings import DataSection, UsageError, require


@dataclass
class AnalyseSettings:
    """Keys of `hrm analyse`."""

    run: str | None = None
    """Run folder of `hrm train` or `hrm quickstart`."""
    batches: int = 1
    """Batches of the run's training data that are measured."""
    batch_size: int = 8
    """Rows in a batch."""
    output: str | None = None
    """Folder for analysis.json, analysis.md and the plots; null: "analysis" in the run folder."""


def analyse_run(settings: Any) -> None:
    """Prints and writes what `settings` (`AnalyseSettings`) asks for; the model is measured as it trains.

    Raises:
        UsageError: a setting, run or data that cannot be used.
    """
    # with accelerate, which the other verbs' start need not wait for
    from hrm.analysis.report import analyse
    from hrm.data import bad_row_of, batches, encode, load_problems
    from hrm.generate import find_checkpoint, load_trained
    from hrm.train import load_tokenizer

    require(settings, "run", lambda value: value is not None, "given: hrm analyse run=FOLDER")
    for name in ("batches", "batch_size"):
        require(settings, name, lambda value: value >= 1, "at least 1")
    folder = Path(settings.run)
    checkpoint, template = find_checkpoint(folder)
    if checkpoint == folder:
        raise UsageError(
            f"run is {settings.run!r}, a checkpoint; it should be a run folder, whose config names the data"
        )
    config = OmegaConf.load(folder / "config.yaml")
    data = OmegaConf.merge(OmegaConf.structured(DataSection), config.data)
    output = folder / "analysis" if settings.output is None else Path(settings.output)
    try:
        output.mkdir(parents=True, exist_ok=True)  # rather than after minutes of work
    except OSError as error:
        raise UsageError(f"output is {str(output)!r}, and cannot be written to: {error.strerror}") from error
    tokenizer = load_tokenizer(str(checkpoint))
    bad_row = bad_row_of(data)
    problems = load_problems(data, config.train.seed, bad_row)
    rows = encode(problems.train, template, tokenizer, data.max_length, bad_row)
    feed = batches(rows, settings.batch_size, tokenizer.pad_token_id, config.train.seed)
    found = analyse(load_trained(checkpoint).train(), list(islice(feed, settings.batches)), output)
    print(found.table())
    print(f"Written to {output}")
