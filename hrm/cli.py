"""The command line: `hrm <verb> [section.key=value ...]`.

Exit status: 0 done; 1 failed while running; 2 used wrongly; 130 stopped by Ctrl-C.

PyTorch and all that is built on it are imported when a verb runs: help and mistakes need not wait for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hrm.interrupt import STOPPED, raise_on_interrupt
from hrm.preset import preset_defaults
from hrm.settings import (
    UsageError,
    cache_folder,
    default_backbone,
    keys_of,
    load_settings,
    load_training_settings,
    nearest,
    resumed,
    run_kind,
)


def quickstart_defaults() -> dict[str, Any]:
    """What the quickstart trains: minutes of two CPU cores, or a larger share of the task in less time on a GPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "hrm": {"d_l": 640, "d_h": 640, "h_cycles": 2, "l_steps": 4},
        "data": {
            "task": "family_relationships",
            "task_options": {"min_family_size": 4, "max_family_size": 5},
            "size": 4000 if on_gpu else 1000,
            "template": "Question: {prompt}\nAnswer: {answer}",
        },
        "train": {"steps": 60 if on_gpu else 72, "batch_size": 32 if on_gpu else 8, "core_lr": 2e-4},
        "eval": {"max_new_tokens": 8, "shots": 2, "batch_size": 64 if on_gpu else 32},
        "run": {"name": "quickstart"},
    }


@dataclass(frozen=True)
class Verb:
    """One thing that the command line does."""

    run: Callable[[Any], None]
    summary: str
    settings: str
    """The class of its settings, as module:class."""
    needs: str
    """A module that imports most of what `run` does, which takes seconds."""
    defaults: Callable[[], dict[str, Any]] = dict
    load: Callable[[Sequence[str]], Any] | None = None
    """Reads the settings where there is more to it than `schema` and `defaults`."""

    @property
    def schema(self) -> type:
        """The class of its settings."""
        module, _, name = self.settings.partition(":")
        return getattr(import_module(module), name)


def quickstart(settings: Any) -> None:
    """Trains on a small task, with the demo model unless another is named."""
    from rich.console import Console

    from hrm.demo import demo_backbone
    from hrm.train import fine_tune

    console = Console()
    if settings.hrm.backbone is None and default_backbone() is None:
        settings.hrm.backbone = str(demo_backbone(console.print))
    fine_tune(settings, console)


def train(settings: Any) -> None:
    """Trains on the user's data."""
    from rich.console import Console

    from hrm.train import fine_tune

    fine_tune(settings, Console())


def train_puzzles(settings: Any) -> None:
    """Trains a puzzle model from scratch."""
    from rich.console import Console

    from hrm.puzzle.train import train_puzzle

    train_puzzle(settings, Console())


def data(settings: Any) -> None:
    """Reads or makes puzzles."""
    from hrm.puzzle.command_data import make_data

    make_data(settings)


def evaluate(settings: Any) -> None:
    """Scores a trained puzzle model."""
    from hrm.puzzle.command_evaluate import evaluate_puzzles

    evaluate_puzzles(settings)


def solve(settings: Any) -> None:
    """Solves puzzles with a trained model."""
    from hrm.puzzle.solve import solve as solve_puzzles

    solve_puzzles(settings)


def plot(settings: Any) -> None:
    """Draws a run."""
    from hrm.plot import plot as plot_metrics

    plot_metrics(settings)


def analyse(settings: Any) -> None:
    """Measures gradient and fixed point of a trained core."""
    from hrm.analysis.command import analyse_run

    analyse_run(settings)


def profile(settings: Any) -> None:
    """Predicts what a training step takes of the GPU's memory."""
    from hrm.profile.command import profile as profile_memory

    profile_memory(settings)


def lm_eval(settings: Any) -> None:
    """Scores a checkpoint on tasks of lm-evaluation-harness."""
    from hrm.lm_eval import lm_eval_tasks

    lm_eval_tasks(settings)


def generate(settings: Any) -> None:
    """Answers one prompt, or each line of standard input."""
    from hrm.generate import answer_all

    answer_all(settings, sys.stdin, sys.stdout, sys.stderr)


def info(settings: Any) -> None:
    """Prints versions, the device, which kernels run, and where things are kept."""
    import torch

    import hrm_kernels

    for package in ("hrm-kernels", "torch", "triton", "transformers", "peft", "accelerate"):
        print(f"{package:15} {_version(package)}")
    print(f"{'device':15} {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}")
    for choice in hrm_kernels.explain():
        print(f"{choice.function:15} {choice.backend} ({choice.reason})")
    print(f"{'cache':15} {cache_folder()} (HRM_HOME)")
    print(f"{'backbone':15} {default_backbone() or 'none set; the quickstart takes Gemma 3 270M'} (HRM_MODEL_PATH)")


VERBS = {
    "quickstart": Verb(
        quickstart,
        "train on Gemma 3 270M in minutes and see what it learnt",
        "hrm.settings:QuickstartSettings",
        "hrm.train",
        quickstart_defaults,
    ),
    "train": Verb(
        train,
        "train on your own prompts and answers; with puzzle=sudoku: on puzzles",
        "hrm.settings:TrainingSettings",
        "hrm.train",
        load=load_training_settings,
    ),
    "generate": Verb(generate, "answer a prompt with a trained model", "hrm.settings:GenerateSettings", "hrm.generate"),
    "profile": Verb(
        profile,
        "predict a training step's memory, and what would save some",
        "hrm.profile.command:ProfileSettings",
        "hrm.profile.report",
    ),
    "plot": Verb(
        plot, "draw the loss, states, Q values, depth and speed of a run", "hrm.plot:PlotSettings", "matplotlib.figure"
    ),
    "analyse": Verb(
        analyse,
        "measure gradient, fixed point and convergence of a trained core",
        "hrm.analysis.command:AnalyseSettings",
        "hrm.generate",
    ),
    "data": Verb(
        data,
        "read, check or make puzzles: Sudoku, mazes, ARC",
        "hrm.puzzle.command_data:DataSettings",
        "hrm.puzzle.command_data",
    ),
    "evaluate": Verb(
        evaluate,
        "score a trained puzzle model on a file of puzzles",
        "hrm.puzzle.command_evaluate:EvaluateSettings",
        "hrm.puzzle.command_evaluate",
    ),
    "lm-eval": Verb(
        lm_eval,
        "score a checkpoint or a plain model on lm-evaluation-harness tasks",
        "hrm.lm_eval:LmEvalSettings",
        "hrm.generate",
    ),
    "solve": Verb(
        solve,
        "solve the puzzles of a file, or of standard input",
        "hrm.puzzle.solve:SolveSettings",
        "hrm.puzzle.solve",
    ),
    "info": Verb(info, "versions, device, kernels and folders", "hrm.settings:InfoSettings", "hrm_kernels"),
}


def _load_puzzle_settings(overrides: Sequence[str]) -> Any:
    from hrm.puzzle.settings import load_puzzle_settings

    return load_puzzle_settings(overrides)


PUZZLE_TRAINING = Verb(
    train_puzzles,
    "train HRM or TRM from scratch on puzzles",
    "hrm.puzzle.settings:PuzzleTrainingSettings",
    "hrm.puzzle.train",
    load=_load_puzzle_settings,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except UsageError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # once for all processes
            print(f"hrm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hrm: stopped", file=sys.stderr)
        return STOPPED


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    name, *overrides = words
    if name not in VERBS:
        raise UsageError(f"unknown verb {name!r}{nearest(name, list(VERBS))}; see hrm --help")
    verb = VERBS[name]
    if name == "train":
        verb = _training(verb, overrides)
    elif name == "profile":
        verb = _from_preset(verb, overrides)
    if name in BARE:  # hrm solve FILE
        bare = [word for word in overrides if _is_bare(word)]
        if len(bare) > 1:  # a shell's *.txt, of which all but the last would be passed over
            raise UsageError(f"{name} takes one {BARE[name]} and was given {len(bare)}: {', '.join(bare)}")
        overrides = [f"{BARE[name]}={word}" if _is_bare(word) else word for word in overrides]
    if any(word in ("-h", "--help") for word in overrides):
        print(_verb_help(name, verb))
        return 0
    if verb.load is not None:
        return _run(verb, verb.load(overrides))
    return _run(verb, load_settings(verb.schema, overrides, _defaults(verb, overrides)))


BARE = {"solve": "path", "plot": "run", "analyse": "run", "lm-eval": "run"}  # key that a word without "=" belongs to


def _is_bare(word: str) -> bool:
    """Whether it is a value by itself; a single dash is one, which stands for standard input."""
    return word == "-" or not ("=" in word or word.startswith("-"))


def _training(verb: Verb, overrides: Sequence[str]) -> Verb:
    """`hrm train` of what the words ask for, whose defaults are those of the preset that they choose."""
    if not _on_puzzles(overrides):
        return _from_preset(verb, overrides)
    words = [word for word in overrides if not word.startswith("-")]
    if _typed("preset", words) and _typed("puzzle", words):
        raise UsageError("preset is given beside puzzle; a puzzle and its model choose their preset themselves")
    from hrm.puzzle.settings import preset_of

    return replace(PUZZLE_TRAINING, defaults=lambda: preset_of(words))


def _from_preset(verb: Verb, overrides: Sequence[str]) -> Verb:
    """`verb` with the values of the preset that the words name, if they do."""
    words = [word for word in overrides if word.startswith(("preset=", "data.task="))]
    return replace(verb, defaults=lambda: preset_defaults(verb.schema, words))


def _on_puzzles(overrides: Sequence[str]) -> bool:
    """Whether the words of `hrm train` ask for a puzzle model, or for going on with a run of one."""
    folder = resumed(overrides)
    return _typed("puzzle", overrides) or (folder is not None and run_kind(folder) == "puzzles")


def _typed(key: str, overrides: Sequence[str]) -> bool:
    return any(word.startswith(f"{key}=") for word in overrides)


def _defaults(verb: Verb, overrides: Sequence[str]) -> Mapping[str, Any]:
    """The verb's defaults; another task than its own does not get options that only its own understands."""
    defaults = verb.defaults()
    if _typed("data.task", overrides):
        defaults.get("data", {}).pop("task_options", None)
    return defaults


def _run(verb: Verb, settings: Any) -> int:
    _quiet()
    from hrm.running import Interrupted, TrainingError, is_out_of_memory
    from hrm_kernels import BackendError

    import_module(verb.needs)
    raise_on_interrupt()
    try:
        verb.run(settings)
    except BackendError as error:
        raise UsageError(f"hrm.fused=true: {error}") from error
    except TrainingError as error:
        print(f"hrm: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        if int(os.environ.get("RANK", 0)) == 0:  # processes stop together
            print(f"hrm: {error}", file=sys.stderr)
        return STOPPED
    except OSError as error:  # a full disk, a closed pipe
        print(f"hrm: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        less = "fewer rows at a time (train.micro_batch, eval.batch_size, batch_size) take less"
        print(f"hrm: out of memory: {reason or type(error).__name__}; {less}", file=sys.stderr)
        return 1
    return 0


def _quiet() -> None:
    """Keeps the libraries' own progress bars and hints from tearing ours apart."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _help() -> str:
    verbs = "\n".join(f"  {name:11} {verb.summary}" for name, verb in VERBS.items())
    return (
        f"usage: hrm <verb> [section.key=value ...]\n\n{verbs}\n\n"
        "hrm <verb> --help lists the verb's keys and their defaults.\n"
        "HRM_MODEL_PATH names the default backbone, HRM_HOME the cache folder (now "
        f"{cache_folder()})."
    )


def _verb_help(name: str, verb: Verb) -> str:
    lines = [f"usage: hrm {name} [key=value ...]", "", verb.summary, ""]
    for key in keys_of(verb.schema, defaults=verb.defaults()):
        default = "null" if key.default is None else key.default
        lines.append(f"  {f'{key.name}={default!r}' if default == '' else f'{key.name}={default}'}")
        if key.doc:
            lines.append(f"      {key.doc}")
    return "\n".join(lines)
