"""Typed settings of the command line: dataclasses, dotted overrides, errors that name the nearest key."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import inspect
import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hrm.config import AdapterConfig, HRMConfig
from hrm.curriculum import is_depth


class UsageError(ValueError):
    """What the user typed or handed over cannot be used; the message is all they need to put it right."""


def cache_folder() -> Path:
    """Where converted models are kept: HRM_HOME, or ~/.cache/hrm."""
    return Path(os.environ.get("HRM_HOME") or Path.home() / ".cache" / "hrm").expanduser()


def default_backbone() -> str | None:
    """Name or path of the backbone that HRM_MODEL_PATH sets; None where it is unset."""
    return os.environ.get("HRM_MODEL_PATH") or None


# ---------------------------------------------------------------------------------------------------- the sections


_MADE_OF: dict[type, type] = {}  # sections made of another class's fields, and that class, which documents them


def section_of(
    name: str,
    source: type,
    extra: Sequence[tuple[str, Any, Any]] = (),
    leave_out: tuple[str, ...] = (),
    optional: bool = False,
) -> type:
    """A dataclass of `source`'s fields as they are before its checks and derived values, with `extra` ones in front;
    `optional`: each may be null, and is unless it is set."""
    hints = get_type_hints(source)
    own = [
        (f.name, hints[f.name] | None, field(default=None))
        if optional
        else (f.name, hints[f.name], field(default=f.default))
        for f in fields(source)
        if f.name not in leave_out
    ]
    made = make_dataclass(name, [*extra, *own])
    _MADE_OF[made] = source
    return made


HRMSection = section_of(
    "HRMSection",
    HRMConfig,
    [
        ("backbone", str | None, field(default=None)),
        ("quantize", str | None, field(default=None)),
        ("loader", str, field(default="transformers")),
        ("offload_per_layer_embeddings", bool, field(default=False)),
    ],
    leave_out=("hidden_size",),
)
LOADING = ("backbone", "quantize", "loader", "offload_per_layer_embeddings")  # how the backbone is loaded
LoraSection = section_of("LoraSection", AdapterConfig, [("enabled", bool, field(default=True))])


@dataclass
class DataSection:
    path: str | None = None
    """JSONL file, one {"prompt": ..., "answer": ...} a line."""
    held_out_path: str | None = None
    """JSONL file to evaluate on; without it rows of `path` are held out."""
    dataset: str | None = None
    """Name or folder of a Hugging Face data set (pip install "hrm-kernels[data]")."""
    subset: str | None = None
    """Configuration of the data set, such as "main"."""
    split: str = "train"
    """Split of the data set."""
    prompt_column: str = "prompt"
    """Key of the prompt in a row."""
    answer_column: str = "answer"
    """Key of the answer in a row."""
    task: str | None = None
    """Task whose problems are generated: object_swaps, pointer_chase, or a name of reasoning-gym's."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task: data.task_options.max_terms=3; of object_swaps and pointer_chase: objects, min_depth,
    max_depth, and questions, how many are asked about a text that is trained on, which shows no answer but the last."""
    held_out_options: dict[str, Any] = field(default_factory=dict)
    """Options that replace these for the held-out problems of object_swaps and pointer_chase: max_depth=20."""
    size: int = 1000
    """Problems to generate for a task, the held-out ones aside."""
    held_out: int = 64
    """Rows kept for evaluation, at most a tenth of a file's or data set's."""
    template: str = "{prompt} {answer}"
    """How a row becomes text; the answer and what follows it are learnt."""
    max_length: int = 512
    """Most tokens of prompt and answer together."""
    bad_rows: str = "error"
    """A row that cannot be used: "error" ends the run before it starts, "skip" passes over it; both name its line."""


@dataclass
class TrainSection:
    steps: int | None = None
    """Optimizer steps; null: `epochs` passes over the data."""
    epochs: float = 1.0
    """Passes over the data where `steps` is null."""
    batch_size: int = 8
    """Rows in a batch, over all processes."""
    micro_batch: int | None = None
    """Rows that go through the model together on one process, halved when out of memory; null: all of a batch."""
    pack: bool = False
    """Put rows behind each other instead of padding them; none sees the others."""
    update_every: str = "batch"
    """"batch": one optimizer step for all segments of a batch; "segment": one for each, as in the paper."""
    segment_growth: str = "none"
    """How the segments grow from 1: "none" (all from the start), "steps" (over the first half), or "plateau"."""
    plateau_window: int = 100
    """Steps over which the loss is averaged to see whether it stands still."""
    plateau_tolerance: float = 0.01
    """Share by which that average has to fall to be falling."""
    depth: list[Any] = field(default_factory=list)
    """Depth curriculum: [share of the steps, h_cycles, l_steps] of each stage before the full depth."""
    optimizer: str = "adamw"
    """"adamw", or with bitsandbytes "adamw_8bit" or "paged_adamw_8bit"."""
    core_lr: float | None = None
    """Peak learning rate of the core; null: 0.08 over the width of its wider state."""
    adapter_lr: float = 5e-4
    """Peak learning rate of the LoRA adapters."""
    warmup: float = 0.1
    """Share of the steps in which the learning rates rise; they then fall along a cosine."""
    weight_decay: float = 0.0
    """AdamW's, on the core's matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    skip_limit: int = 10
    """Steps in a row that may be skipped since their gradient is not finite, before training stops."""
    gradient_checkpointing: bool = False
    """Compute the backbone's activations again in the backward pass instead of keeping them."""
    deterministic: bool = False
    """Only kernels that give the same bits every time."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    report_to: list[str] = field(default_factory=list)
    """The Trainer's integrations: tensorboard, wandb, ..."""
    prometheus_port: int | None = None
    """Serve the metrics on this port of this machine; 0: any free one."""
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    seed: int = 0
    """Seed of data, initial weights and order."""


@dataclass
class EvalSection:
    batch_size: int = 32
    """Problems decoded together."""
    max_new_tokens: int = 32
    """Longest answer."""
    shots: int = 0
    """Also evaluate the untrained model with so many solved examples in front of each problem."""


@dataclass
class RunSection:
    name: str = "train"
    """First part of the run folder's name."""
    folder: str = "runs"
    """Where run folders are made."""
    resume: str | None = None
    """Run folder to go on with, from its newest checkpoint and with its settings; other keys may not be given."""


@dataclass
class QuickstartSettings:
    """Keys of `hrm quickstart`."""

    hrm: HRMSection = field(default_factory=HRMSection)  # type: ignore[valid-type]
    lora: LoraSection = field(default_factory=LoraSection)  # type: ignore[valid-type]
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    run: RunSection = field(default_factory=RunSection)


@dataclass
class TrainingSettings(QuickstartSettings):
    """Keys of `hrm train`."""

    preset: str | None = None
    """Settings to start from: the name of a preset (depth, gsm8k), or a YAML file with the sections above."""


@dataclass
class DecodingSection:
    fused: bool | str = "auto"
    """True: Triton kernels or an error; False: plain PyTorch; "auto": Triton on CUDA, else plain PyTorch."""
    segments: int | None = None
    """Run exactly so many segments, without halting; null: as the checkpoint says."""


@dataclass
class GenerateSettings:
    """Keys of `hrm generate`."""

    run: str | None = None
    """Run folder or checkpoint."""
    prompt: str | None = None
    """What to answer; null: one prompt a line from standard input."""
    max_new_tokens: int = 64
    """Longest answer."""
    temperature: float = 0.0
    """Above 0: sample at this temperature; 0: the likeliest token."""
    seed: int = 0
    """Seed of sampling."""
    hrm: DecodingSection = field(default_factory=DecodingSection)


@dataclass
class InfoSettings:
    """`hrm info` has no keys."""


# ------------------------------------------------------------------------------------------------ reading overrides


class Key(NamedTuple):
    """One settable key of a verb."""

    name: str  # dotted
    kind: Any  # its type
    default: Any
    doc: str


def keys_of(schema: type, prefix: str = "", defaults: Mapping[str, Any] | None = None) -> Iterator[Key]:
    """Every leaf of `schema`, in order, with `defaults` in place of the dataclass's own."""
    hints, docs = get_type_hints(schema), _docs_of(schema)
    for item in fields(schema):
        given = (defaults or {}).get(item.name, MISSING)
        kind = item.default_factory if item.default_factory is not MISSING else hints[item.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from keys_of(kind, f"{prefix}{item.name}.", None if given is MISSING else given)
        else:
            own = kind() if item.default_factory is not MISSING else item.default
            yield Key(prefix + item.name, hints[item.name], own if given is MISSING else given, docs.get(item.name, ""))


def load_settings(schema: type, overrides: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """An instance-like typed config of `schema` with `defaults`, then each `key=value` of `overrides`, put in.

    Raises:
        UsageError: an override is no key=value, its key is unknown (the message names the nearest), or its value is
            of the wrong type.
    """
    config = OmegaConf.merge(OmegaConf.structured(schema), defaults or {})
    assert isinstance(config, DictConfig)
    keys = {key.name: key for key in keys_of(schema)}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"{override!r} is no setting; settings read section.key=value")
        _set(config, _find(keys, name), name, value)
    return config


def load_training_settings(overrides: Sequence[str]) -> Any:
    """The settings of one `hrm train`: defaults, then the preset, then `overrides`; or those of the run that it goes on
    with.

    Raises:
        UsageError: as `load_settings`, `hrm.preset.read_preset` and `saved_settings`.
    """
    from hrm.preset import preset_defaults  # which is made of this module

    if (folder := resumed(overrides)) is not None:
        return saved_settings(folder, TrainingSettings, overrides)
    return load_settings(TrainingSettings, overrides, preset_defaults(TrainingSettings, overrides))


def resumed(overrides: Sequence[str]) -> str | None:
    """The run folder that `overrides` go on with, if they do."""
    given = [word.partition("=")[2] for word in overrides if word.startswith("run.resume=")]
    return given[-1] if given and given[-1] not in ("", "null") else None


def run_kind(folder: str) -> str | None:
    """What the run in `folder` trains on, by its config.yaml: "puzzles" or "text"; None: there is no telling."""
    path = Path(folder) / "config.yaml"
    keys = {line.partition(":")[0] for line in path.read_text(errors="replace").splitlines()} if path.is_file() else ()
    return "puzzles" if "puzzle" in keys else "text" if "lora" in keys else None


def saved_settings(folder: str, schema: type, overrides: Sequence[str], beside: tuple[str, ...] = ()) -> Any:
    """The settings that the run in `folder` was started with, `run.resume` set.

    Args:
        schema: the class of its settings.
        overrides: what was typed; only `run.resume` and keys of `beside` may be there.

    Raises:
        UsageError: another key was given, the run is on text where one on puzzles is wanted or the other way round, or
            the folder holds no such settings; the message names it.
    """
    allowed = ("run.resume=", *(f"{key}=" for key in beside))
    if others := [word for word in overrides if not word.startswith(allowed)]:
        raise UsageError(f"{others[0]!r} is given beside run.resume; a resumed run keeps its settings")
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UsageError(f"run.resume is {folder!r}; it should be a run folder, with a config.yaml")
    kind, wanted = run_kind(folder), "puzzles" if "puzzle" in (item.name for item in fields(schema)) else "text"
    if kind not in (wanted, None):
        way_out = ", or puzzle be left out" if wanted == "puzzles" else ""
        raise UsageError(f"run.resume is {folder!r}, a run on {kind}; it should be a run on {wanted}{way_out}")
    try:
        settings = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{path} holds no settings of such a run: {reason}") from error
    settings.run.resume = folder
    return settings


def _find(keys: Mapping[str, Key], name: str) -> Key:
    for key in keys.values():
        if name == key.name or (name.startswith(f"{key.name}.") and isinstance(key.default, dict)):
            return key
    raise UsageError(f"unknown key {name!r}{nearest(name, keys)}")


def _set(config: DictConfig, key: Key, name: str, text: str) -> None:
    value = _read(text, _kinds(key))
    if int in _kinds(key) and type(value) is int and not -(2**63) <= value < 2**63:  # torch and numpy hold no more
        raise UsageError(f"{name} is {text}; it should be a whole number of at most 64 bits")
    try:
        OmegaConf.update(config, name, value, merge=False, force_add=name != key.name)
    except (OmegaConfBaseException, ValueError) as error:
        raise UsageError(f"{name} is {text!r}; it should be {kind_name(key.kind)}") from error


def _kinds(key: Key) -> tuple[Any, ...]:
    """The types that a value may have; one given for a part of a dictionary may have any."""
    if isinstance(key.default, dict) or get_origin(key.kind) is list:
        return ()
    return get_args(key.kind) or (key.kind,)


def _read(text: str, kinds: tuple[Any, ...]) -> Any:
    """YAML's reading of `text`; but where text is wanted, only a null or truth value that is wanted too is read so."""
    try:
        value = OmegaConf.select(OmegaConf.from_dotlist([f"value={text}"]), "value")
    except YAMLError:
        value = text
    return text if str in kinds and not (isinstance(value, bool | None) and type(value) in kinds) else value


def nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """ "; the nearest is ..." for an unknown `name`, compared by whole names first and by last parts then."""
    by_last = {other.rpartition(".")[2]: other for other in known}
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    found = found or [by_last[last] for last in difflib.get_close_matches(name.rpartition(".")[2], by_last, 1, 0.0)]
    return f"; the nearest is {found[0]!r}" if found else "; this verb has no keys"


def kind_name(kind: Any) -> str:
    """A type in the words of an error message."""
    if get_origin(kind) is list:
        return "a list, [...]"
    if get_origin(kind) is dict:
        return "options, {name: value, ...}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return " or ".join(words.get(part, getattr(part, "__name__", str(part))) for part in get_args(kind) or (kind,))


_DOCS = {  # of the fields that sections add to another class's
    "backbone": "Name or path of a causal language model; null: HRM_MODEL_PATH.",
    "quantize": '"nf4": the backbone in 4 bits (pip install "hrm-kernels[bnb]"); null: as it is stored.',
    "loader": '"transformers" or "unsloth" (pip install "hrm-kernels[unsloth]").',
    "offload_per_layer_embeddings": "Keep Gemma 3n's per-layer embeddings in CPU memory.",
    "enabled": "LoRA adapters.",
}


@functools.cache
def _docs_of(schema: type) -> dict[str, str]:
    """The string under each field of a dataclass, also for sections made of another class's fields."""
    docs = dict(_DOCS)
    body = ast.parse(textwrap.dedent(inspect.getsource(_MADE_OF.get(schema, schema)))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(statement.target, ast.Name) and isinstance(after.value, ast.Constant)
            docs[statement.target.id] = re.sub(r"\s+", " ", str(after.value.value))
    return docs


# ------------------------------------------------------------------------------------------------ using them


def hrm_config(section: Any) -> HRMConfig:
    """The core's config that the `hrm` section asks for.

    Raises:
        UsageError: a value that `HRMConfig` refuses; the message names it.
    """
    values = OmegaConf.to_container(section)  # lists as lists, for JSON
    assert isinstance(values, dict)
    return checked("hrm", HRMConfig, {str(key): value for key, value in values.items() if key not in LOADING})


def lora_dict(section: Any) -> dict[str, Any] | bool:
    """What `HRMGemmaForCausalLM.from_backbone` takes as `lora`."""
    values = {str(key): value for key, value in section.items() if key != "enabled"}
    checked("lora", AdapterConfig, values)
    return values if section.enabled else False


def checked(section: str, kind: type, values: Mapping[str, Any]) -> Any:
    try:
        return kind(**values)
    except ValueError as error:
        raise UsageError(str(error).replace(f"{kind.__name__}: ", f"{section}.", 1)) from error


def core_lr(train: Any, core: Any) -> float:
    """`train.core_lr`, or where it is null that of a core as wide as `core` (with d_l and d_h): half the rate for twice
    the width (docs/training.md, "Problems of known depth")."""
    return 0.08 / max(core.d_l, core.d_h) if train.core_lr is None else train.core_lr


def check_training(settings: Any, processes: int = 1) -> None:
    """Raises a UsageError that names the first key whose value makes no sense, for so many processes."""
    for name in ("data.size", "data.held_out", "eval.batch_size", "eval.max_new_tokens"):
        require(settings, name, lambda value: value >= 1, "at least 1")
    require(settings, "eval.shots", lambda value: value >= 0, "at least 0")
    require(settings, "data.bad_rows", lambda value: value in ("error", "skip"), "error or skip")
    check_step(settings)
    check_packages(settings)
    if settings.train.batch_size % processes:
        raise UsageError(
            f"train.batch_size is {settings.train.batch_size}; it should be a multiple of the {processes} processes"
        )
    _check_room(settings, hrm_config(settings.hrm), processes)


def check_step(settings: Any) -> None:
    """Raises a UsageError that names the first key whose value makes no sense on any machine, of those that `hrm train`
    and `hrm profile` both have."""
    for name in ("data.max_length", "train.batch_size", "train.save_every", "train.log_every", "train.skip_limit",
                 "train.plateau_window"):  # fmt: skip
        require(settings, name, lambda value: value >= 1, "at least 1")
    for name in ("train.steps", "train.micro_batch"):
        require(settings, name, lambda value: value is None or value >= 1, "at least 1, or null")
    for name in ("train.epochs", "train.adapter_lr", "train.clip"):
        require(settings, name, lambda value: 0 < value < math.inf, "a finite number above 0")
    should = "a finite number above 0, or null"
    require(settings, "train.core_lr", lambda value: value is None or 0 < value < math.inf, should)
    require(settings, "train.epochs", lambda value: value <= 1e6, "at most a million")
    require(settings, "train.seed", lambda value: 0 <= value < 2**32, "from 0 to 4294967295")
    port = "from 0 (any free one) to 65535, or null"
    require(settings, "train.prometheus_port", lambda value: value is None or 0 <= value <= 65535, port)
    require(settings, "train.warmup", lambda value: 0 <= value < 1, "from 0 to below 1")
    for name in ("train.weight_decay", "train.plateau_tolerance"):
        require(settings, name, lambda value: 0 <= value < math.inf, "a finite number, at least 0")
    require(settings, "hrm.quantize", lambda value: value in (None, "nf4"), '"nf4" or null')
    require(settings, "train.depth", is_depth, "[[share, h_cycles, l_steps], ...] with rising shares below 1")
    for name, choices in CHOICES.items():
        require(settings, name, lambda value, choices=choices: value in choices, " or ".join(choices))
    _check_update(settings)
    lora_dict(settings.lora)
    core = hrm_config(settings.hrm)
    if core.act and core.max_segments == 1:
        raise UsageError(
            "hrm.max_segments is 1; it should be at least 2 with hrm.act=true, or nothing can go on or halt"
        )
    if OmegaConf.select(settings, "run.resume") is None:  # a run that goes on keeps what it was started with
        _check_used(settings)


NEEDED = {  # a setting: the keys that say nothing without it
    "hrm.act=true": (
        "hrm.min_segments",
        "hrm.exploration",
        "hrm.segment_price",
        "hrm.q_target",
        "hrm.q_gradient",
        "hrm.q_loss_weight",
    ),
    "hrm.q_target=replay": ("hrm.replay_size",),
    "hrm.h_mixer=attention": ("hrm.attn_heads", "hrm.attn_kv_heads", "hrm.rope_theta"),
    "lora.enabled=true": ("lora.low_rank", "lora.high_rank", "lora.dropout"),
    "train.segment_growth=plateau": ("train.plateau_window", "train.plateau_tolerance"),
}


def _check_used(settings: Any) -> None:
    """Raises a UsageError that names the first key that is set and would be passed over."""
    unset = {key.name: key.default for key in keys_of(QuickstartSettings)}
    for setting, names in NEEDED.items():
        switch, _, value = setting.partition("=")
        if str(OmegaConf.select(settings, switch)).lower() != value:
            for name in names:
                default = "null" if unset[name] is None else unset[name]
                should = f"{default}, its default, without {setting}; set that, or leave {name} out"
                require(settings, name, lambda value, name=name: value == unset[name], should)
    most, core = settings.hrm.max_segments, settings.hrm
    if not core.act and most > max(1, core.segments):  # a number up to that is what a checkpoint's config holds
        raise UsageError(
            f"hrm.max_segments is {most}; it should be 1, its default, without hrm.act=true; set that, or "
            f"hrm.segments={most} for as many segments each time"
        )


def check_packages(settings: Any) -> None:
    """Raises a UsageError that names the first key whose value needs a package that is not installed."""
    for name, plain, package, extra in (
        ("hrm.loader", "transformers", "unsloth", "unsloth"),
        ("hrm.quantize", None, "bitsandbytes", "bnb"),
        ("train.optimizer", "adamw", "bitsandbytes", "bnb"),
    ):
        value = OmegaConf.select(settings, name)
        if value != plain and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{name} is {value!r}, which needs the package {package}; "
                f'pip install "hrm-kernels[{extra}]", or set {name}={plain or "null"}'
            )


PLACE_BYTES = 64  # of a row's place in the list of a batch: a pointer, and a tuple of two
PROBLEM_BYTES = 100  # of a problem: a pointer, an object, two texts


def _check_room(settings: Any, core: HRMConfig, processes: int) -> None:
    """Raises a UsageError that names sizes which no such machine could hold, whatever the backbone."""
    from hrm.room import check_room  # PyTorch is imported with it

    def check(names: Sequence[str], what: str, least: int) -> None:
        check_room(" and ".join(f"{name} is {OmegaConf.select(settings, name)}" for name in names), what, least)

    check(("hrm.d_l", "hrm.d_h"), "the core's weights", 4 * replace(core, hidden_size=1).weights)
    check(("train.batch_size",), "the list of a batch's rows", PLACE_BYTES * settings.train.batch_size // processes)
    if core.act and core.q_target == "replay":
        check(("hrm.replay_size",), "the replay buffer", core.replay_size * 2 * core.d_h * 2)  # bfloat16 at the least
    if settings.data.task is not None:
        count = settings.data.size + settings.data.held_out
        check(("data.size", "data.held_out"), "the problems", PROBLEM_BYTES * count)


CHOICES = {
    "hrm.loader": ("transformers", "unsloth"),
    "train.update_every": ("batch", "segment"),
    "train.segment_growth": ("none", "steps", "plateau"),
    "train.optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
}


def _check_update(settings: Any) -> None:
    if settings.train.update_every == "segment" and (conflict := segment_conflict(settings)) is not None:
        raise UsageError(conflict)


def segment_conflict(settings: Any) -> str | None:
    """What does not go together with one update a segment, in words that name the first such key; None: all does."""
    for name, wanted, why in (
        ("train.pack", False, "whose carry is by row"),
        ("train.segment_growth", "none", "where each batch has the same number of steps"),
        ("hrm.stop_residual", 0.0, "where each batch has the same number of steps"),
        ("hrm.q_target", ("bootstrap", "none"), "where no step sees two segments"),
    ):
        value, allowed = OmegaConf.select(settings, name), wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in allowed:
            should = " or ".join(str(choice).lower() for choice in allowed)
            return f'{name} is {value}; it should be {should} with train.update_every="segment", {why}'
    return None


def check_generation(settings: Any) -> None:
    """Raises a UsageError that names the first key of `hrm generate` whose value makes no sense."""
    require(settings, "max_new_tokens", lambda value: value >= 1, "at least 1")
    require(settings, "temperature", lambda value: 0 <= value < math.inf, "a finite number, at least 0")
    require(settings, "seed", lambda value: 0 <= value < 2**32, "from 0 to 4294967295")
    require(settings, "hrm.segments", lambda value: value is None or value >= 1, "at least 1, or null")
    require(settings, "hrm.fused", lambda value: value in (True, False, "auto"), "true, false or auto")


def check_length(what: str, tokens: int, model: Any, remedy: str) -> None:
    """Raises a UsageError where `what`, of `tokens` tokens, is longer than the backbone of `model` allows."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise UsageError(f"{what} may take {tokens} tokens; the backbone allows {longest}. {remedy}")


def typed_lines(stream: Iterable[str]) -> Iterator[str]:
    """The lines of what is typed or piped in, as they come; a UsageError where they are no valid UTF-8."""
    try:
        yield from stream
    except UnicodeDecodeError as error:  # its place counts from where the stream last read on
        raise UsageError(f"standard input: no valid UTF-8 ({error.reason})") from error


def require(settings: Any, name: str, test: Any, should: str) -> None:
    value = OmegaConf.select(settings, name)
    if not test(value):
        raise UsageError(f"{name} is {value!r}; it should be {should}")
