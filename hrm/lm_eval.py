"""`hrm lm-eval`: a checkpoint, or a plain language model, on the tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrm.settings import UsageError, nearest, require

TASK_FILES = Path(__file__).parent / "lm_eval_tasks"
INSTALL = 'pip install "hrm-kernels[eval]"'
FINAL_NUMBER = re.compile(r"#### -?[0-9.,]+\s*\Z")
DEPTH = ("segments", "h_cycles", "l_steps")  # the keys that set how long the core computes


@dataclass
class LmEvalSettings:
    """Keys of `hrm lm-eval`."""

    run: str | None = None
    """Run folder or checkpoint, or the folder of a plain causal language model."""
    tasks: str = "gsm8k_local"
    """Tasks, groups or tags, with commas between them: of this package gsm8k_local (right answers) and gsm8k_bits (how
    likely the written-out ones are), or any of lm-eval's."""
    data: str | None = None
    """For these two: folder of test.jsonl and train.jsonl, or a file to test on with train.jsonl beside it; rows are
    {"question": ..., "answer": ... that ends with #### NUMBER}. The few-shot examples come from train.jsonl."""
    include_path: str | None = None
    """Folder of further task files, which replace tasks of the same name."""
    limit: int | None = None
    """Problems of each task, the first ones; null: all."""
    num_fewshot: int | None = None
    """Solved examples in front of each problem; null: as the task says."""
    batch_size: int = 8
    """Problems that go through the model together."""
    max_new_tokens: int | None = None
    """Longest answer; null: as the task says, or 256."""
    segments: int | None = None
    """Run exactly so many segments, without halting; null: as the checkpoint says."""
    h_cycles: int | None = None
    """Cycles in a segment; null: as the checkpoint says."""
    l_steps: int | None = None
    """L steps in a cycle; null: as the checkpoint says."""
    output: str | None = None
    """JSON file for the results, with every answer."""
    seed: int = 1234
    """Seed of the few-shot examples and of tasks that sample; lm-eval's own default."""


def lm_eval_tasks(settings: Any) -> dict[str, Any]:
    """Prints lm-eval's table and how deep the core went for what `settings` (`LmEvalSettings`) asks for.

    Returns:
        lm-eval's results, with `segments_used`: segments a token, over all that went through the core; None without
        one. What `output` holds.

    Raises:
        UsageError: a setting, run, task or data file that cannot be used, or lm-eval is not installed.
    """
    _check(settings)
    manager, tasks = _find_tasks(settings)
    if settings.output is not None:
        _check_writable(Path(settings.output))
    # with transformers' models, which the other verbs' start need not wait for
    from hrm.generate import find_checkpoint
    from hrm.train import load_tokenizer

    checkpoint, _ = find_checkpoint(Path(settings.run))
    tokenizer, model = load_tokenizer(str(checkpoint)), _load(checkpoint)
    _set_depth(model, settings)
    harness = _harness(model, tokenizer, settings)
    with _depth_of(model) as depth:
        results = _evaluate(harness, manager, tasks, settings)
    results["segments_used"] = None if depth is None else depth.mean
    results["config"] |= {name: settings[name] for name in DEPTH}
    if settings.output is not None:
        _write(Path(settings.output), results)
    _print(results)
    return results


def _check(settings: Any) -> None:
    """Raises a UsageError that names the first key whose value makes no sense, or the package that is missing."""
    require(settings, "run", lambda value: value is not None, "given: hrm lm-eval run=FOLDER")
    require(settings, "batch_size", lambda value: value >= 1, "at least 1")
    for name in ("limit", "max_new_tokens", *DEPTH):
        require(settings, name, lambda value: value is None or value >= 1, "at least 1, or null")
    for name in DEPTH:
        require(settings, name, lambda value: value is None or value < 2**31, "below 2147483648")
    require(settings, "seed", lambda value: 0 <= value < 2**32, "from 0 to 4294967295")
    require(settings, "num_fewshot", lambda value: value is None or value >= 0, "at least 0, or null")
    require(settings, "include_path", lambda value: value is None or Path(value).is_dir(), "a folder, or null")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(f"hrm lm-eval needs the package lm-eval; {INSTALL}") from error


def _check_writable(path: Path) -> None:
    """Raises a UsageError where `path` cannot be written, rather than after hours of work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # leaves what stands there, until there are results
    except OSError as error:
        raise UsageError(f"output is {str(path)!r}, and cannot be written to: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------- the tasks


def _find_tasks(settings: Any) -> tuple[Any, list[Any]]:
    """lm-eval's task manager, and what it is to load: names, and the whole configuration of a task of this package."""
    names = list(dict.fromkeys(name.strip() for name in settings.tasks.split(",") if name.strip()))
    if not names:
        raise UsageError(f"tasks is {settings.tasks!r}; it should be names of tasks with commas between them")
    manager = _task_manager(settings.include_path, names)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        close = nearest(unknown[0], manager.all_tasks)
        raise UsageError(f"tasks is {settings.tasks!r}, of which lm-eval does not know {unknown[0]!r}{close}")
    local = {name for name in names if _folder(manager, name) == TASK_FILES}
    if settings.data is not None and not local:
        own = " or ".join(sorted(path.stem for path in TASK_FILES.glob("*.yaml")))
        raise UsageError(f"data is {settings.data!r}; it should be null without a task that reads it: {own}")
    return manager, [_local_task(manager.task_index[n].cfg, settings) if n in local else n for n in names]


def _task_manager(include_path: str | None, names: Sequence[str]) -> Any:
    """One that knows the tasks of this package and of the user's folder, and lm-eval's own where `names` need them."""
    from lm_eval.tasks import TaskManager

    folders = [str(TASK_FILES), *([] if include_path is None else [include_path])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(names) <= set(manager.all_subtasks):  # a group may be made of lm-eval's
        return manager
    return TaskManager(include_path=folders)  # reads 14,000 files, which takes seconds


def _folder(manager: Any, name: str) -> Path | None:
    path = manager.task_index[name].yaml_path
    return None if path is None else path.parent


def _local_task(config: dict[str, Any], settings: Any) -> dict[str, Any]:
    """The configuration of a task of this package, with the files that it reads filled in."""
    if settings.data is None:
        raise UsageError(f"data is missing; {config['task']} needs a folder of test.jsonl and train.jsonl: data=FOLDER")
    test = Path(settings.data)
    test = test / "test.jsonl" if test.is_dir() else test
    files = {"test": str(test)}
    _check_rows(test)
    shots = config["num_fewshot"] if settings.num_fewshot is None else settings.num_fewshot
    if shots == 0:
        config = {**config, "training_split": None, "fewshot_split": None}
    else:
        train = test.with_name("train.jsonl")
        if not train.is_file():
            raise UsageError(f"{train} is no file; it should hold the few-shot examples, or num_fewshot should be 0")
        if (rows := _check_rows(train)) < shots:
            raise UsageError(f"num_fewshot is {shots}; it should be at most the rows of {train}, {rows}")
        files["train"] = str(train)
    if config["output_type"] == "loglikelihood":
        config = {**config, "process_results": _bits_per_byte}
    return {**config, "num_fewshot": shots, "dataset_kwargs": {"data_files": files}}


def _bits_per_byte(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Log-likelihood of one answer, nats, and its bytes, for lm-eval to add up over all answers."""
    return {"bits_per_byte": (results[0][0], len(doc["answer"].encode("utf-8")))}


def _check_rows(path: Path) -> int:
    """How many rows a file of GSM8K's form has.

    Raises:
        UsageError: no file, or a row of another form; the message has file and line.
    """
    from hrm.data import read_jsonl

    rows = read_jsonl(path, "question", "answer")
    for row in rows:
        if not FINAL_NUMBER.search(row.answer):
            raise UsageError(f"{row.source}: 'answer' ends with {row.answer[-20:]!r}; it should end with #### NUMBER")
    return len(rows)


# ---------------------------------------------------------------------------------------------------- the model


def _load(checkpoint: Path) -> Any:
    """A trained model, or a plain language model, on the device it is to run on."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from hrm.data import first_line
    from hrm.generate import load_trained
    from hrm.modeling import HRMGemmaConfig

    try:
        if isinstance(AutoConfig.from_pretrained(checkpoint), HRMGemmaConfig):
            return load_trained(checkpoint)
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    except UsageError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{checkpoint} cannot be loaded: {first_line(error)}") from error
    return model.to(_device()).eval()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _set_depth(model: Any, settings: Any) -> None:
    """Makes the core run as deep as `settings` asks; with a number of segments, that many, without halting."""
    asked = {name: settings[name] for name in DEPTH if settings[name] is not None}
    if not hasattr(model, "hrm"):
        for name, value in asked.items():
            raise UsageError(f"{name} is {value}; it should be null: {settings.run} is a model without a core")
        return
    config = model.hrm.config
    exact = {"act": False, "segment_weights": None} if "segments" in asked else {}
    # the gradient's reach is training's, and no longer than what runs; fused: whatever machine it was trained on
    model.hrm.config = replace(config, grad_cycles=1, grad_l_steps=1, fused="auto", **exact, **asked)


@contextmanager
def _depth_of(model: Any) -> Iterator[Any]:
    """An `hrm.evaluate.Depth` of a model with a core; None for another."""
    from hrm.evaluate import Depth

    with Depth(model) if hasattr(model, "hrm") else nullcontext() as depth:
        yield depth


def _harness(model: Any, tokenizer: Any, settings: Any) -> Any:
    """The model as lm-eval calls it; in bfloat16 on CUDA, as `hrm generate` runs it."""
    from lm_eval.models.huggingface import HFLM

    # lm-eval looks where the config of a model with a core has none, and would take 2048
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if settings.max_new_tokens is not None and longest is not None and settings.max_new_tokens >= longest:
        raise UsageError(f"max_new_tokens is {settings.max_new_tokens}; the model has {longest} for prompt and answer")
    with _errors_only("lm_eval"):  # it warns that a model object is no name
        return HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            max_length=longest,
            mixed_precision_dtype="bfloat16" if model.device.type == "cuda" else None,
            softmax_dtype="float32",
        )


@contextmanager
def _errors_only(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------------------------------- the results


def _evaluate(harness: Any, manager: Any, tasks: list[Any], settings: Any) -> dict[str, Any]:
    from datasets.exceptions import DatasetGenerationError
    from lm_eval import simple_evaluate

    from hrm.data import first_line

    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        return simple_evaluate(
            model=harness,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            batch_size=settings.batch_size,
            gen_kwargs=None if settings.max_new_tokens is None else {"max_gen_toks": settings.max_new_tokens},
            **dict.fromkeys(seeds, settings.seed),
        )
    except DatasetGenerationError as error:
        raise UsageError(f"tasks={settings.tasks}: {first_line(error.__cause__ or error)}") from error


def _write(path: Path, results: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    path.write_text(json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False), "utf-8")


def _print(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    if results["segments_used"] is not None:
        print(f"segments used: {results['segments_used']:.2f} a token")
