"""Training of puzzle models: resume, faults, schedules, and one run that learns."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import SafetensorError

from hrm.cli import main
from hrm.curriculum import set_depth, stages
from hrm.puzzle import PuzzleConfig
from hrm.puzzle import settings as puzzle_settings
from hrm.puzzle import train as train_module
from hrm.puzzle.engine import Engine
from hrm.puzzle.saving import STATE, load_checkpoint, load_model, save_checkpoint
from hrm.puzzle.settings import load_puzzle_settings
from hrm.puzzle.sudoku import generate
from hrm.puzzle.train import PuzzleRun, learning_rate, train_puzzle
from hrm.running import Interrupted, TrainingError, locked
from hrm.saving import checkpoints
from hrm.settings import UsageError, load_training_settings

SMALL = [
    "puzzle=sudoku-4x4",
    "hrm.hidden_size=32",
    "hrm.num_heads=2",
    "hrm.expansion=1",
    "data.size=40",
    "data.held_out=8",
    "train.batch_size=8",
    "train.log_every=2",
    "train.warmup_steps=2",
    "eval.every=0",
]


def run(folder: Path, *overrides: str) -> Path:
    settings = load_puzzle_settings([*SMALL, f"run.folder={folder}", *overrides])
    return train_puzzle(settings, Console(quiet=True))


def resume(folder: Path) -> Path:
    return train_puzzle(load_puzzle_settings([f"run.resume={folder}"]), Console(quiet=True))


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    timed = ("seconds", "examples_per_second", "memory_gb", "took")
    read = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in read]


@pytest.mark.parametrize(
    "overrides",
    [(), ("model=hrm", "hrm.l_layers=1", "hrm.h_layers=1"), ("train.optimizer=muon",),
     ("train.depth=[[0.5,1,1]]",)],
)  # fmt: skip
def test_a_resumed_run_goes_on_bit_for_bit(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("train.steps=10", "train.save_every=4", *overrides)
    whole = run(tmp_path / "whole", *options)
    step = Engine.step

    def killed(self: Engine, number: int, *rest: Any) -> None:
        if number == 7:
            raise MemoryError
        step(self, number, *rest)

    monkeypatch.setattr(Engine, "step", killed)
    with pytest.raises(MemoryError):
        run(tmp_path / "cut", *options)
    monkeypatch.setattr(Engine, "step", step)
    (cut,) = (tmp_path / "cut").iterdir()
    assert [line["step"] for line in lines(cut)] == [2, 4, 6]
    for name in ("metrics.jsonl", "evaluations.jsonl"):  # which the checkpoint has too
        (cut / name).unlink(missing_ok=True)
    resume(cut)
    assert lines(cut) == lines(whole)
    assert lines(cut, "evaluations.jsonl") == lines(whole, "evaluations.jsonl")
    (expected, _), (found, _) = load_checkpoint(checkpoints(whole)[-1]), load_checkpoint(checkpoints(cut)[-1])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """The newest checkpoint loads and the run ends as if nothing had happened."""
    options = ("train.steps=14", "train.save_every=1", "data.held_out=1")
    whole = run(tmp_path / "whole", *options)
    command = [sys.executable, "-m", "hrm", "train", *SMALL, *options, f"run.folder={tmp_path / 'cut'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cut").glob("*/checkpoints/step-*3")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (cut,) = (tmp_path / "cut").iterdir()
    resume(cut)
    assert lines(cut) == lines(whole)
    assert not list((cut / "checkpoints").glob(".writing-*"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at step \d+, with learning rate 1e\+30; last good checkpoint: none"):
        run(
            tmp_path,
            "train.steps=20",
            "train.lr=1e30",
            "train.lr_min_ratio=1",
            "train.warmup_steps=0",
            "train.save_every=50",
        )


def test_the_last_good_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "learning_rate", lambda step, settings: 1.0 if step < 4 else 1e33)
    with pytest.raises(TrainingError, match=r"last good checkpoint: .*step-00000004"):
        run(tmp_path, "train.steps=8", "train.save_every=4", "train.log_every=4")


def test_settings_that_were_edited_are_refused_by_name(tmp_path: Path) -> None:
    generate(4, 9, 0, 0)[0].puzzles.save(tmp_path / "here.npz")
    shutil.copy(tmp_path / "here.npz", tmp_path / "copy.npz")
    folder = run(tmp_path / "runs", f"data.path={tmp_path}/here.npz", "train.steps=2")
    config = (folder / "config.yaml").read_text()
    for old, new, message in (
        ("  seed: 0\n", "  seed: 5\n", r"^train.seed is 5 in .*config.yaml; it should be 0, as the run was started"),
        ("hidden_size: 32", "hidden_size: 64", "^hrm.hidden_size is 64 in .*; it should be 32"),
        ("here.npz", "copy.npz", r'^data.path is ".*copy.npz" in .*; it should be ".*here.npz"'),
    ):
        (folder / "config.yaml").write_text(config.replace(old, new))
        with pytest.raises(UsageError, match=message):
            resume(folder)
    (tmp_path / "here.npz").unlink()  # moved: the same puzzles under another name
    resume(folder)


def test_a_truncated_state_is_refused_by_name(tmp_path: Path) -> None:
    folder = run(tmp_path, "train.steps=2", "train.save_every=2")
    path = checkpoints(folder)[-1] / STATE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"state\.safetensors cannot be read"):
        resume(folder)


def test_a_folder_is_trained_into_by_one_process(tmp_path: Path) -> None:
    folder = run(tmp_path, "train.steps=4", "train.save_every=4")
    shutil.rmtree(checkpoints(folder)[-1])
    before = (folder / "metrics.jsonl").read_text()
    with locked(folder), pytest.raises(UsageError, match="is being trained into by another process"):
        resume(folder)
    assert (folder / "metrics.jsonl").read_text() == before  # the other process's
    resume(folder)


def test_puzzles_that_make_no_batches_are_refused(tmp_path: Path) -> None:
    made = generate(4, 3, 0, 0)[0].puzzles
    uneven = replace(made, groups=made.groups * 0, puzzle_ids=np.array([0, 0, 1], np.int32), num_puzzle_ids=2)
    uneven.save(tmp_path / "uneven.npz")
    with pytest.raises(UsageError, match=r"^data.path: group 0 has puzzle ids with unequal numbers of rows"):
        run(tmp_path / "runs", f"data.path={tmp_path}/uneven.npz")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("part", ["training", "test"])
def test_other_puzzles_are_refused_by_name(tmp_path: Path, part: str) -> None:
    first, second = (generate(4, 9, 3, seed) for seed in (0, 1))
    files = {"training": tmp_path / "train.npz", "test": tmp_path / "test.npz"}
    for path, rated in zip(files.values(), first, strict=True):
        rated.puzzles.save(path)
    data = [f"data.path={files['training']}", f"data.test_path={files['test']}"]
    folder = run(tmp_path / "runs", *data, "train.steps=2")
    kept = first[part == "test"].puzzles
    second[part == "test"].puzzles.save(files[part])
    with pytest.raises(
        UsageError, match=f"the {part} puzzles of {files[part]} are not what the run in .* started with"
    ):
        resume(folder)
    assert replace(kept, labels=kept.labels[::-1]).digest() != kept.digest()
    kept.subset(slice(None, None, -1)).save(files[part])  # the same ones in another order
    with pytest.raises(UsageError, match="cannot go on"):
        resume(folder)
    kept.save(files[part])
    resume(folder)


def test_the_saved_model_is_the_averaged_one(tmp_path: Path) -> None:
    folder = run(tmp_path, "train.steps=3", "train.save_every=3", "train.ema=0.5")
    state, _ = load_checkpoint(checkpoints(folder)[-1])
    model, about = load_model(folder)
    assert torch.equal(model.head, state["averaged.head"])
    assert not torch.equal(model.head, state["model.head"])
    assert about == {"task": "sudoku", "side": [4, 4], "vocab_size": 6}


def test_a_test_set_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    generate(4, 3, 0, 0)[0].puzzles.save(tmp_path / "four.npz")
    generate(6, 3, 0, 0)[0].puzzles.save(tmp_path / "six.npz")
    with pytest.raises(UsageError, match=r"data.test_path: puzzles have 36 cells; they should have 16"):
        run(tmp_path / "runs", f"data.path={tmp_path}/four.npz", f"data.test_path={tmp_path}/six.npz")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path, "train.steps=2")

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr("hrm.saving.save_file", full)
    with pytest.raises(UsageError, match=r"step-00000003 cannot be written: .*No space left on device"):
        save_checkpoint(folder, 3, {"a": torch.zeros(3)}, {})
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_finished_run_is_evaluated_once(tmp_path: Path) -> None:
    folder = run(tmp_path, "train.steps=2")
    before = lines(folder, "evaluations.jsonl")
    resume(folder)
    assert lines(folder, "evaluations.jsonl") == before and len(before) == 1


def test_a_model_that_a_kill_took_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is there, but model/ is still that of an earlier step."""
    options = ("train.steps=4", "train.save_every=2")
    whole = run(tmp_path / "whole", *options)
    save = train_module.save_model

    def killed(model: Any, folder: Path, about: Any) -> None:
        if len(checkpoints(folder.parent)) == 2:
            raise MemoryError
        save(model, folder, about)

    monkeypatch.setattr(train_module, "save_model", killed)
    with pytest.raises(MemoryError):
        run(tmp_path / "cut", *options)
    monkeypatch.setattr(train_module, "save_model", save)
    (cut,) = (tmp_path / "cut").iterdir()
    resume(cut)
    (expected, _), (found, _) = load_model(whole), load_model(cut)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_a_manifest_that_lacks_a_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 3, {"a": torch.zeros(3)}, {"seconds": 0, "identity": {}, "settings": {}})
    assert load_checkpoint(folder)[1]["step"] == 3
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match=f"manifest.json does not list {STATE}, as it should"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["x: [", "trian:\n  steps: 3\n", "train:\n  steps: many\n"])
def test_damaged_settings_of_a_run_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"config.yaml holds no settings of such a run: \S"):
        resume(tmp_path)


def test_runs_on_text_and_on_puzzles_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    puzzles, text = run(tmp_path, "train.steps=1"), tmp_path / "text"
    text.mkdir()
    OmegaConf.save(load_training_settings([]), text / "config.yaml")
    for words, message in (
        ([f"run.resume={text}", "puzzle=sudoku"],
         f"run.resume is '{text}', a run on text; it should be a run on puzzles, or puzzle be left out"),
        ([f"run.resume={puzzles}", "puzzle=maze"],
         f"puzzle is 'maze'; it should be 'sudoku-4x4', as of the run in {puzzles}"),
        ([f"run.resume={puzzles}", "hrm.backbone=x"],
         "'hrm.backbone=x' is given beside run.resume; a resumed run keeps its settings"),
        ([f"run.resume={puzzles}", "preset=depth"],
         "'preset=depth' is given beside run.resume; a resumed run keeps its settings"),
    ):  # fmt: skip
        assert main(["train", *words]) == 2
        assert capsys.readouterr().err == f"hrm: {message}\n"
    with pytest.raises(UsageError, match=r"a run on puzzles; it should be a run on text$"):
        load_training_settings([f"run.resume={puzzles}"])
    assert main(["train", f"run.resume={puzzles}", "puzzle=sudoku"]) == 0


def test_a_signal_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("train.steps=8", "train.log_every=4")
    whole = run(tmp_path / "whole", *options)
    step = Engine.step

    def signalled(self: Engine, number: int, *rest: Any) -> None:
        step(self, number, *rest)
        if number == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Engine, "step", signalled)
    with pytest.raises(Interrupted, match="stopped after step 5 of 8"):
        run(tmp_path / "cut", *options)
    monkeypatch.setattr(Engine, "step", step)
    (cut,) = (tmp_path / "cut").iterdir()
    assert [line["step"] for line in lines(cut)] == [4, 5]
    resume(cut)
    expected, found = (load_checkpoint(checkpoints(folder)[-1])[0] for folder in (whole, cut))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_learning_rate() -> None:
    settings = load_puzzle_settings(
        [*SMALL, "train.steps=100", "train.warmup_steps=10", "train.lr_min_ratio=0.1"]
    ).train
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) == rates[10]
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.1 < rates[-1] < 0.102


def test_stages_of_the_depth_curriculum() -> None:
    found = [(s.first, s.h_cycles, s.l_steps) for s in stages([[0.25, 1, 2], [0.5, 2, 3]], 100, 3, 6)]
    assert found == [(0, 1, 2), (25, 2, 3), (50, 3, 6)]


def test_the_full_depth_comes_back_with_its_gradient() -> None:
    full = PuzzleConfig(h_cycles=3, l_steps=4, grad_cycles=2, grad_l_steps=3)
    config = replace(full)
    plan = stages([[0.5, 1, 2]], 10, 3, 4)
    set_depth(config, full, plan, 4)
    assert (config.h_cycles, config.l_steps, config.grad_cycles, config.grad_l_steps) == (1, 2, 1, 2)
    set_depth(config, full, plan, 5)
    assert config == full
    whole = PuzzleConfig.of("trm", l_steps=6)
    set_depth(config, whole, stages([[0.5, 2, 8]], 10, 3, 6), 0)
    assert config.grad_l_steps == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("puzzle=sudoko", "the nearest is 'sudoku'"),
        ("model=gpt", "should be one of hrm, trm, trm-mlp"),
        ("train.depth=[[2,1,1]]", "train.depth"),
        ("train.optimizer=sgd", "adamw or muon"),
        ("hrm.hidden_size=33", "hrm.num_heads is 2"),
        ("data.path=missing.csv", "missing.csv is no file"),
        ("data.test_path=test.csv", "data.test_path is 'test.csv' and data.path null; both should be files"),
        ("train.seed=-1", "train.seed is -1"),
        ("train.lr=inf", "train.lr is inf; it should be a finite number above 0"),
        ("train.embedding_lr=.nan", "train.embedding_lr is nan; it should be a finite number above 0"),
        ("train.weight_decay=inf", "train.weight_decay is inf; it should be a finite number, at least 0"),
        ("train.embedding_weight_decay=inf", "train.embedding_weight_decay is inf"),
        ("train.clip=.inf", "train.clip is inf; it should be a finite number, at least 0"),
        ("train.ema=.nan", "train.ema is nan"),
        ("data.easier=1.5", "data.easier is 1.5"),
        ("eval.limit=0", "eval.limit is 0"),
        ("train.stps=3", "the nearest is 'train.steps'"),
    ],
)
def test_what_cannot_be_used_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path, override)
    assert not list(tmp_path.iterdir())


def test_every_preset_makes_a_model() -> None:
    for preset in puzzle_settings.PRESETS.glob("*.yaml"):
        name = next(n for n in sorted(puzzle_settings.DEFAULT_MODEL, reverse=True) if preset.stem.startswith(n))
        model = preset.stem.removeprefix(f"{name}-")
        settings = load_puzzle_settings([f"puzzle={name}", f"model={model}", "data.path=some.npz"])
        config = puzzle_settings.model_config(settings, vocab_size=11, seq_len=81, num_puzzle_ids=1)
        assert config.grad_l_steps in (1, config.l_steps)


def test_the_preset_learns_4x4_sudoku(tmp_path: Path) -> None:
    """The main job on a CPU, end to end: over 90 % of puzzles that it never saw."""
    settings = load_puzzle_settings(["puzzle=sudoku-4x4", f"run.folder={tmp_path}", "eval.every=0"])
    folder = train_puzzle(settings, Console(quiet=True))
    (result,) = lines(folder, "evaluations.jsonl")
    assert result["count"] == 200 and result["exact"] > 0.9
    assert (folder / "curve.png").stat().st_size > 10_000


def test_an_evaluation_that_a_kill_took_is_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("train.steps=6", "train.save_every=2", "eval.every=2")
    whole = run(tmp_path / "whole", *options)
    evaluate = PuzzleRun._evaluate

    def killed(self: PuzzleRun, limit: int | None) -> Any:
        if self.step == 4:
            raise MemoryError
        return evaluate(self, limit)

    monkeypatch.setattr(PuzzleRun, "_evaluate", killed)
    with pytest.raises(MemoryError):
        run(tmp_path / "cut", *options)
    monkeypatch.setattr(PuzzleRun, "_evaluate", evaluate)
    (cut,) = (tmp_path / "cut").iterdir()
    resume(cut)
    assert [line["step"] for line in lines(cut, "evaluations.jsonl")] == [2, 4, 6]
    assert lines(cut, "evaluations.jsonl") == lines(whole, "evaluations.jsonl")


def test_help_shows_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "puzzle=sudoku-4x4", "--help"]) == 0
    assert "train.steps=300" in capsys.readouterr().out


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(self: PuzzleRun, name: str, line: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PuzzleRun, "_append", full)
    assert main(["train", *SMALL, "train.steps=2", f"run.folder={tmp_path}"]) == 1
    assert "No space left on device" in capsys.readouterr().err
