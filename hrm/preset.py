"""Presets of `hrm train` and `hrm profile`: settings kept as YAML, in the package by name or in a user's file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hrm.settings import NEEDED, Key, TrainingSettings, UsageError, keys_of, kind_name, load_settings, nearest

PRESETS = Path(__file__).parent / "presets"
SUFFIXES = (".yaml", ".yml")  # of a file; anything else is a name
NOT_IN_ONE = ("preset", "run.resume")  # keys that belong on the command line alone


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_defaults(schema: type, overrides: Sequence[str]) -> dict[str, Any]:
    """What `load_settings` takes as defaults of `schema`, which has a key `preset`, where `overrides` are typed.

    Raises:
        UsageError: as `load_settings` and `read_preset`.
    """
    name = load_settings(schema, overrides).preset
    return {} if name is None else read_preset(name, schema, overrides)


def read_preset(name: str, schema: type, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a preset by section, and its name under "preset".

    Args:
        name: of a packaged preset, or a file that ends in .yaml or .yml.
        schema: the class of the settings; what only `hrm train` has keys for is checked and left out of others.
        overrides: what was typed; with another task than the preset's, the options of the preset's task are left out,
            and so is what the preset says of something that is turned off (`hrm.settings.NEEDED`).

    Raises:
        UsageError: there is no such preset, it cannot be read, is no YAML, or holds a key that there is not, one that
            belongs on the command line or a value of the wrong type; the message names the file and the key.
    """
    path = _path(name)
    keys, wanted = {key.name: key for key in keys_of(TrainingSettings)}, {key.name for key in keys_of(schema)}
    config = OmegaConf.structured(TrainingSettings)
    preset = OmegaConf.create({"preset": name})
    for key, value in _leaves(_load(path), keys, path):
        _check_type(config, key, value, path)
        if key.name in wanted:
            OmegaConf.update(preset, key.name, value, force_add=True)
    values: Any = OmegaConf.to_container(preset)
    if any(word.startswith("data.task=") for word in overrides):
        for options in ("task_options", "held_out_options"):
            values.get("data", {}).pop(options, None)
    for setting in _turned_off(schema, overrides):
        section, _, own = setting.partition(".")
        values.get(section, {}).pop(own, None)
    return values


def _turned_off(schema: type, overrides: Sequence[str]) -> list[str]:
    """The keys that say nothing any more by what was typed."""
    typed, off = load_settings(schema, overrides), list[str]()
    for setting, names in NEEDED.items():
        switch, _, value = setting.partition("=")
        is_typed = any(word.startswith(f"{switch}=") for word in overrides)
        if switch in off or (is_typed and str(OmegaConf.select(typed, switch)).lower() != value):
            off += [*names, "hrm.max_segments"] if switch == "hrm.act" else names
    return off


def _path(name: str) -> Path:
    if name.endswith(SUFFIXES):
        return Path(name).expanduser()
    names = preset_names()
    if name not in names:
        known = f"there are {', '.join(names)}, and files that end in .yaml"
        raise UsageError(f"preset is {name!r}{nearest(name, names)} ({known})")
    return PRESETS / f"{name}.yaml"


def _load(path: Path) -> dict[Any, Any]:
    try:
        loaded = OmegaConf.load(path)
        values = OmegaConf.to_container(loaded, resolve=True)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        if error.strerror is None:  # OmegaConf's own: a file that holds a single value
            raise UsageError(f"{path} holds no sections; it should, such as train: {{steps: 100}}") from error
        raise UsageError(f"preset is {str(path)!r}, and cannot be read: {error.strerror}") from error
    if not isinstance(loaded, DictConfig) or not isinstance(values, dict):
        raise UsageError(f"{path} holds a list; it should hold sections, such as train: {{steps: 100}}")
    return values


def _leaves(
    values: Mapping[Any, Any], keys: Mapping[str, Key], path: Path, prefix: str = ""
) -> Iterator[tuple[Key, Any]]:
    """The keys that `values` set, each with its value."""
    for part, value in values.items():
        name = f"{prefix}{part}"
        if name in NOT_IN_ONE:
            raise UsageError(f"{path}: {name} is set; it belongs on the command line, not in a preset")
        if name in keys:
            yield keys[name], value
        elif not any(key.startswith(f"{name}.") for key in keys):
            known = {key.rpartition(".")[0] for key in keys} - {""} if isinstance(value, Mapping) else set(keys)
            raise UsageError(f"{path}: unknown key {name!r}{nearest(name, sorted(known))}")
        elif isinstance(value, Mapping):
            yield from _leaves(value, keys, path, f"{name}.")
        elif value is not None:  # all of a section's keys may be commented out
            raise UsageError(f"{path}: {name} is {value!r}; it should be a section, with keys of its own")


def _check_type(config: Any, key: Key, value: Any, path: Path) -> None:
    try:
        OmegaConf.update(config, key.name, value, merge=False)
    except (OmegaConfBaseException, ValueError) as error:
        raise UsageError(f"{path}: {key.name} is {value!r}; it should be {kind_name(key.kind)}") from error
