"""Sizes that no machine could hold are refused by name, before anything that long is begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_backbone import TINY_CORE, save_tiny_backbone

from hrm import HRMConfig, HRMCore
from hrm.cli import main
from hrm.puzzle import PuzzleConfig, PuzzleModel
from hrm.puzzle.settings import load_puzzle_settings
from hrm.puzzle.train import train_puzzle
from hrm.room import check_room, machine_memory
from hrm.settings import UsageError, check_training, load_training_settings

BIG = 10**12
WIDE = 2**31 - 64  # the widest that a config takes


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "none"])
@pytest.mark.parametrize("heads", [(None, None), (4, 2), (1, 1)])
def test_the_cores_weights_are_counted_exactly(heads: tuple[int | None, int | None], mixer: str, act: bool) -> None:
    config = HRMConfig(
        hidden_size=24, d_l=48, d_h=80, head_size=16, h_mixer=mixer, attn_heads=heads[0], attn_kv_heads=heads[1],
        act=act,
    )  # fmt: skip
    assert config.weights == sum(p.numel() for p in HRMCore(config).parameters())


@pytest.mark.parametrize("model", ["hrm", "trm", "trm-mlp"])
@pytest.mark.parametrize("own", [{}, {"positions": "learned"}, {"puzzle_tokens": 3, "puzzle_emb_size": 40}])
def test_a_puzzle_models_weights_are_counted_exactly(model: str, own: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "num_heads": 2, "seq_len": 16, "num_puzzle_ids": 7, "puzzle_emb_size": 0}
    config = PuzzleConfig.of(model, **{**sizes, **own})
    made = PuzzleModel(config)
    embedding = 0 if made.puzzle_embedding is None else made.puzzle_embedding.weight.numel()
    assert config.weights == sum(p.numel() for p in made.parameters()) + embedding


def test_what_fits_is_not_refused() -> None:
    check_room("x is 1", "it", machine_memory())
    with pytest.raises(UsageError, match=r"^x is 1: it would take 1,000,000 GB, and this machine has \d+ GB$"):
        check_room("x is 1", "it", 10**15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"hrm.d_l={WIDE}"], f"hrm.d_l is {WIDE} and hrm.d_h is 4096: the core's weights would take"),
        ([f"hrm.d_h={WIDE}"], f"hrm.d_l is 2048 and hrm.d_h is {WIDE}: the core's weights would take"),
        ([f"train.batch_size={BIG}"], f"train.batch_size is {BIG}: the list of a batch's rows would take 64,000 GB"),
        (["data.task=object_swaps", f"data.size={BIG}"], f"data.size is {BIG} and data.held_out is 64: the problems"),
        (["data.task=chain_sum", f"data.held_out={BIG}"], f"data.held_out is {BIG}: the problems would take"),
        (
            ["hrm.act=true", "hrm.max_segments=2", "hrm.q_target=replay", f"hrm.replay_size={WIDE}"],
            "hrm.replay_size is 2147483584: the rep",
        ),
    ],
)
def test_sizes_of_a_text_run(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_training(load_training_settings(words))


@pytest.mark.parametrize(
    "words", [[f"data.max_length={BIG}"], [f"eval.batch_size={BIG}"], [f"train.steps={BIG}"], [f"data.size={BIG}"]]
)
def test_limits_may_be_as_high_as_one_likes(words: list[str]) -> None:
    check_training(load_training_settings(words))


def test_rows_are_planned_no_longer_than_the_backbone_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"hrm.backbone={save_tiny_backbone(tmp_path)}", *TINY_CORE, f"data.max_length={BIG}"]
    assert main(["profile", *words]) == 0
    assert "8 x 512 tokens" in capsys.readouterr().out


def test_ranks_of_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(json.dumps({"prompt": f"{n}?", "answer": "yes"}) + "\n" for n in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = [f"hrm.backbone={save_tiny_backbone(tmp_path / 'backbone')}", *TINY_CORE]
    words += [f"data.path={tmp_path / 'rows.jsonl'}", f"run.folder={tmp_path / 'runs'}"]
    assert main(["train", *words, f"lora.high_rank={BIG}"]) == 2
    assert f"hrm: lora.high_rank is {BIG}: the adapters' weights would take" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["profile", *words[:-2], f"lora.high_rank={BIG}"]) == 0  # of a larger machine, perhaps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [f"hrm.hidden_size={WIDE}"],
            f"hrm.hidden_size is {WIDE}, hrm.expansion is .*: the model's weights would take",
        ),
        (["hrm.expansion=1e12"], r"hrm.expansion is 1000000000000.0, .*: the model's weights would take"),
        (["hrm.l_layers=2000000000"], "hrm.l_layers is 2000000000, .*: the model's weights would take"),
        (["hrm.puzzle_tokens=2000000000"], "hrm.puzzle_tokens is 2000000000, .*: the model's weights would take"),
        (["model=trm", "hrm.puzzle_tokens=2000000000"], "the states of its rows of 2000000016 tokens would take"),
        ([f"train.batch_size={BIG}"], f"train.batch_size is {BIG}: the states of its rows of 16 tokens would take"),
        ([f"data.size={BIG}"], f"size is {BIG} and held_out 200; they should be at most 40960 together"),
    ],
)
def test_sizes_of_a_puzzle_run(words: list[str], message: str, tmp_path: Path) -> None:

    settings = load_puzzle_settings(["puzzle=sudoku-4x4", "data.size=20", f"run.folder={tmp_path / 'runs'}", *words])
    with pytest.raises(UsageError, match=message):
        train_puzzle(settings, Console(quiet=True))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=sudoku", f"size={BIG}"], f"size is {BIG} and held_out 0; they should be at most 40960 together"),
        (["task=maze", f"size={BIG}"], f"size is {BIG} and held_out 0; they should be at most 204800 together"),
        (["task=maze", "side=1000000"], "side is 1000000: the first mazes to choose from would take 4,096,000 GB"),
        (["task=arc", f"copies={BIG}"], f"copies is {BIG}; it should be below 2903040, a task's symmetries"),
    ],
)
def test_sizes_of_generated_puzzles(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *words, f"output={tmp_path / 'some.npz'}"]) == 2
    assert capsys.readouterr().err.startswith(f"hrm: {message}")
