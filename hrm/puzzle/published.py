"""Reads checkpoints of the published HRM and TRM code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm.puzzle.config import PuzzleConfig
from hrm.puzzle.model import PuzzleModel

_PREFIXES = re.compile(r"^(?:_orig_mod\.|module\.|model\.|inner\.)+")
_NAMES = {
    "embed_tokens.embedding_weight": "embedding",
    "embed_pos.embedding_weight": "positions",
    "lm_head.weight": "head",
    "q_head.weight": "q_head",
    "q_head.bias": "q_bias",
    "puzzle_emb.weights": "puzzle_embedding.weight",
    "H_init": "z_h_init",
    "L_init": "z_l_init",
}
_STACKS = {"H_level": "h_stack", "L_level": "l_stack"}
_PARTS = {
    "self_attn.qkv_proj.weight": "mix_in",
    "self_attn.o_proj.weight": "mix_out",
    "mlp_t.gate_up_proj.weight": "mix_in",
    "mlp_t.down_proj.weight": "mix_out",
    "mlp.gate_up_proj.weight": "gate_up",
    "mlp.down_proj.weight": "down",
}
_LAYER = re.compile(r"^(H_level|L_level)\.layers\.(\d+)\.(.+)$")
_TRM_PUZZLE_TOKENS = 16


def load_published(
    source: str | Path | Mapping[str, Tensor], *, seq_len: int | None = None, **values: Any
) -> PuzzleModel:
    """A `PuzzleModel` with the weights of a published checkpoint.

    Sizes are read off the tensors, what is not in them (heads, cycles, steps) is as HRM or TRM was published for
    Sudoku; TRM's checkpoints for mazes and ARC want `l_steps=4`.

    Args:
        source: a checkpoint file of `sapientinc/HRM` or `SamsungSAILMontreal/TinyRecursiveModels` (read without
            unpickling code), or its state dict; key prefixes such as `_orig_mod.model.inner.` may be there or not.
        seq_len: cells of a puzzle; needed for models with attention and RoPE, whose weights do not tell.
        values: fields of `PuzzleConfig` that differ from the defaults, such as `h_cycles`, `l_steps`, `puzzle_tokens`.

    Raises:
        ValueError: `source` is no such checkpoint; the message lists tensors that are missing, unexpected or misshapen.
    """
    if not isinstance(source, Mapping):
        source = _read(source)
    if others := [key for key, value in source.items() if not isinstance(value, Tensor)]:
        kind = type(source[others[0]]).__name__
        raise ValueError(f"source has a {kind} under {others[0]!r}; it should be a state dict, tensors alone")
    state, unexpected = _renamed(source)
    config = _config_of(state, seq_len, values)
    model = PuzzleModel(config)
    expected = model.state_dict()
    problems = [f"unexpected: {name}" for name in unexpected + sorted(set(state) - set(expected))]
    problems += [f"missing: {name}" for name in sorted(set(expected) - set(state))]
    for name in sorted(set(state) & set(expected)):
        if state[name].shape != expected[name].shape:
            was, should = tuple(state[name].shape), tuple(expected[name].shape)
            problems.append(f"{name} has shape {was}; it should be {should}")
    if problems:
        raise ValueError("source does not fit the model:\n  " + "\n  ".join(problems))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def _read(path: str | Path) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:  # torch advises to let the file run its code
        raise ValueError(f"source is {str(path)!r}, which is no file of tensors alone, or is damaged") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"source holds a {type(found).__name__}; it should hold a state dict")
    return found


def _renamed(source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under our names, and the keys that have none."""
    state: dict[str, Tensor] = {}
    unexpected = []
    for key, tensor in source.items():
        name = _PREFIXES.sub("", key)
        ours = _our_name(name)
        if ours in state:
            unexpected.append(f"{key}, which is there under another prefix too")
        elif ours:
            state[ours] = tensor
        elif not name.startswith(("puzzle_emb.local_", "rotary_emb.")):  # scratch and tables, remade at every start
            unexpected.append(key)
    return state, unexpected


def _our_name(name: str) -> str | None:
    if (layer := _LAYER.match(name)) is None:
        return _NAMES.get(name)
    part = _PARTS.get(layer[3])
    return part and f"{_STACKS[layer[1]]}.{layer[2]}.{part}"


def _config_of(state: Mapping[str, Tensor], seq_len: int | None, values: Mapping[str, Any]) -> PuzzleConfig:
    if "embedding" not in state or "l_stack.0.down" not in state:
        raise ValueError("source is no checkpoint of HRM or TRM: it has no embed_tokens or no L_level")
    for name in ("embedding", "l_stack.0.mix_in", "l_stack.0.mix_out"):  # what sizes are read off
        if name not in state or state[name].dim() != 2:
            should = f"missing: {name}" if name not in state else f"{name} has shape {tuple(state[name].shape)}"
            raise ValueError(f"source does not fit the model:\n  {should}; it should be a matrix")
    vocab_size, d = state["embedding"].shape
    layers = {stack: len({key.split(".")[1] for key in state if key.startswith(stack)}) for stack in _STACKS.values()}
    hrm = layers["h_stack"] > 0
    puzzle = state.get("puzzle_embedding.weight")
    size = 0 if puzzle is None else puzzle.shape[1]
    tokens = values.get("puzzle_tokens", -(-size // d) if hrm or not size else _TRM_PUZZLE_TOKENS)
    found: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": d,
        "l_layers": layers["l_stack"],
        "h_layers": layers["h_stack"],
        "puzzle_emb_size": size,
        "num_puzzle_ids": 1 if puzzle is None else puzzle.shape[0],
        "puzzle_tokens": tokens,
    }
    # a SwiGLU over positions maps back to them (rows of its down projection); a learned table has a row for each
    mixes = state["l_stack.0.mix_in"].shape[1] != d or state["l_stack.0.mix_in"].shape[0] != 3 * d
    if mixes:
        found |= {"mixer": "mlp", "positions": "none", "seq_len": state["l_stack.0.mix_out"].shape[0] - tokens}
    if "positions" in state:
        found |= {"positions": "learned", "seq_len": state["positions"].shape[0] - tokens}
    if seq_len is not None:
        found["seq_len"] = seq_len
    if "seq_len" not in found:
        raise ValueError(
            "seq_len is None; it should be given, since these weights do not tell how many cells a puzzle has"
        )
    return PuzzleConfig.of("hrm" if hrm else "trm", **found | dict(values))
