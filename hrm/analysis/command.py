"""`hrm analyse`: gradient and fixed point of a trained core, measured on its own training data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from hrm.settings import DataSection, TrainingSettings, UsageError, require, run_kind, saved_settings

if TYPE_CHECKING:
    from hrm.modeling import HRMGemmaForCausalLM


@dataclass
class AnalyseSettings:
    """Keys of `hrm analyse`."""

    run: str | None = None
    """Run folder of `hrm train` or `hrm quickstart`, or one of its training checkpoints; of a run that has no trained
    model yet the newest of these is taken."""
    batches: int = 1
    """Batches of the run's training data that are measured."""
    batch_size: int = 8
    """Rows in a batch."""
    terms: int = 8
    """Terms of the Neumann series, from 1."""
    output: str | None = None
    """Folder for analysis.json, analysis.md and the plots; null: "analysis" in the run folder."""


def analyse_run(settings: Any) -> None:
    """Prints and writes what `settings` (`AnalyseSettings`) asks for; the model is measured as it trains.

    Raises:
        UsageError: a setting, run or data that cannot be used.
    """
    # with accelerate, which the other verbs' start need not wait for
    from hrm.analysis.report import analyse
    from hrm.data import Template, bad_row_of, batches, encode, load_problems
    from hrm.train import backbone_of, load_tokenizer

    require(settings, "run", lambda value: value is not None, "given: hrm analyse run=FOLDER")
    for name in ("batches", "batch_size", "terms"):
        require(settings, name, lambda value: value >= 1, "at least 1")
    folder, checkpoint = find_measured(settings.run)
    training = _is_training(checkpoint)  # whose model is made by all of its run's settings
    config = saved_settings(str(folder), TrainingSettings, []) if training else OmegaConf.load(folder / "config.yaml")
    data = OmegaConf.merge(OmegaConf.structured(DataSection), config.data)
    output = folder / "analysis" if settings.output is None else Path(settings.output)
    try:
        output.mkdir(parents=True, exist_ok=True)  # rather than after minutes of work
    except OSError as error:
        raise UsageError(f"output is {str(output)!r}, and cannot be written to: {error.strerror}") from error
    tokenizer = load_tokenizer(backbone_of(config) if training else str(checkpoint))
    bad_row = bad_row_of(data)
    problems = load_problems(data, config.train.seed, bad_row)
    rows = encode(problems.train, Template(data.template), tokenizer, data.max_length, bad_row)
    feed = batches(rows, settings.batch_size, tokenizer.pad_token_id, config.train.seed)
    print(f"Measuring {_told(checkpoint)}", flush=True)  # it takes minutes
    model = load_measured(folder, checkpoint, config).train()
    found = analyse(model, list(islice(feed, settings.batches)), output, terms=settings.terms)
    print(found.table())
    print(f"Written to {output}")


def find_measured(path: str) -> tuple[Path, Path]:
    """The run folder that `path` is or is in, and the folder of what is measured: the trained model, the training
    checkpoint that `path` is, or where there is no trained model yet the newest one.

    Raises:
        UsageError: there is none, it belongs to no run, or to one on puzzles.
    """
    from hrm.generate import find_checkpoint
    from hrm.saving import checkpoints
    from hrm.train import MODEL

    folder = Path(path)
    whole = folder.resolve()
    run = whole.parent.parent if whole in checkpoints(whole.parent.parent) else folder
    saved = checkpoints(run)
    if saved and run_kind(str(run)) != "text":
        raise UsageError(f"run is {path!r}; it should be of a run on text, with its config.yaml")
    if run != folder:
        return run, folder
    if saved and not (run / MODEL / "config.json").is_file():
        return run, saved[-1]
    checkpoint, _ = find_checkpoint(run)
    if checkpoint == run:
        raise UsageError(f"run is {path!r}, a checkpoint; it should be a run folder, whose config names the data")
    return run, checkpoint


def load_measured(run: Path, checkpoint: Path, config: Any) -> HRMGemmaForCausalLM:
    """The model of a trained model's folder, or of a training checkpoint's, which holds only what trains: the rest is
    the backbone's that the run's settings, `config`, name.

    Raises:
        UsageError: a file is damaged, or settings or backbone are not those that the checkpoint was written with.
    """
    from hrm.generate import load_trained
    from hrm.running import recorded
    from hrm.saving import check_manifest, read_json
    from hrm.train import backbone_of, load_model
    from hrm.trainer import digest_backbone
    from hrm.training_state import MODEL, PROGRESS, check_record, load_weights

    if not _is_training(checkpoint):
        return load_trained(checkpoint)
    check_record(checkpoint, recorded(config), run)
    check_manifest(checkpoint, (MODEL,))
    backbone = backbone_of(config)
    model = load_model(backbone, config)
    if digest_backbone(model) != read_json(checkpoint / PROGRESS, ("identity",))["identity"]["backbone"]:
        raise UsageError(f"hrm.backbone is {backbone!r}, which is not what {checkpoint} was trained on")
    load_weights(checkpoint, model)
    return model


def _is_training(checkpoint: Path) -> bool:
    return not (checkpoint / "config.json").is_file()  # a training checkpoint is no folder for `from_pretrained`


def _told(checkpoint: Path) -> str:
    from hrm.saving import step_of

    if not _is_training(checkpoint):
        return f"the trained model in {checkpoint}"
    return f"the training checkpoint of step {step_of(checkpoint.resolve())} in {checkpoint}"
