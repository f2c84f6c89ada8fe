"""Training puzzle models in two processes over gloo on the CPU: what one process does, whatever their rows do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from puzzle_worker import run
from safetensors.torch import load_file
from test_puzzle_train import lines

from hrm.puzzle import arc, maze, sudoku
from hrm.puzzle.data import BatchStream, PuzzleSet
from hrm.puzzle.saving import load_checkpoint, load_model
from hrm.saving import checkpoints

TESTS = Path(__file__).parent
SMALL = [
    "puzzle=sudoku-4x4",
    "model=hrm",
    "hrm.hidden_size=32",
    "hrm.num_heads=2",
    "hrm.expansion=1",
    "hrm.l_layers=1",
    "hrm.h_layers=1",
    "hrm.puzzle_tokens=1",
    "hrm.puzzle_emb_size=16",
    "hrm.exploration=0.5",
    "train.batch_size=8",
    "train.log_every=2",
    "train.save_every=4",
    "train.steps=6",
    "train.warmup_steps=1",
    "eval.every=4",
]
OTHER = ["train.clip=0.5", "train.optimizer=muon", "train.stagger=false", "data.easier=0.5", "hrm.puzzle_emb_size=0"]


class Place:
    """A folder of runs, and what two processes found in theirs."""

    def __init__(self, path: Path) -> None:
        self.path, self._jobs = path, []  # type: ignore[var-annotated]
        for name, made in zip(("train", "test"), sudoku.generate(4, 40, 9, 0), strict=True):
            ids = np.arange(len(made.puzzles), dtype=np.int32) % 5
            replace(made.puzzles, puzzle_ids=ids, num_puzzle_ids=5).save(path / f"{name}.npz")

    def words(self, name: str, *words: str) -> list[str]:
        data = [f"data.path={self.path / 'train.npz'}", f"data.test_path={self.path / 'test.npz'}"]
        return ["train", *SMALL, *data, *words, f"run.folder={self.path / name}"]

    def folder(self, name: str) -> Path:
        (found,) = (self.path / name).iterdir()
        return found

    def add(self, words: list[str], signal_at: int | None = None) -> None:
        self._jobs.append({"words": words, "signal_at": signal_at})

    def launch(self) -> list[list[dict[str, Any]]]:
        """Both processes' outcomes of each job."""
        (self.path / "jobs.json").write_text(json.dumps(self._jobs))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", port]
        words = [*torchrun, "--nproc-per-node", "2", str(TESTS / "puzzle_worker.py"), str(self.path / "jobs.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parents[2])}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        each = [json.loads((self.path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
        return [list(pair) for pair in zip(*each, strict=True)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def both(place: Place) -> list[list[dict[str, Any]]]:
    """Everything that two processes do in these tests, in one launch, since starting them takes most of the time."""
    one = [run(place.words("one"), place.path / "one-0.safetensors")]
    one.append(run(place.words("one-other", *OTHER), place.path / "one-1.safetensors"))
    one.append(run(place.words("one-then-two"), signal_at=2))
    assert [found["status"] for found in one] == [0, 0, 130]
    place.add(place.words("two"))
    place.add(place.words("two-other", *OTHER))
    place.add(place.words("two-then-one"), signal_at=2)
    place.add(["train", f"run.resume={place.folder('one-then-two')}"])
    place.add(place.words("refused", "train.batch_size=7"))
    place.add(place.words("bad", "train.lr=1e30"))
    return place.launch()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        difference = (tensor.double() - other[name].double()).norm()
        assert difference <= tolerance * tensor.double().norm(), (name, difference / tensor.double().norm())


def assert_same_lines(one: Path, other: Path, name: str, tolerance: float) -> None:
    for a, b in zip(lines(one, name), lines(other, name), strict=True):
        assert b.pop("by_segment", None) == a.pop("by_segment", None)
        assert b == pytest.approx(a, rel=tolerance)


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    (expected, _), (found, _) = (load_checkpoint(checkpoints(folder)[-1]) for folder in (one, other))
    assert_same(expected, found, tolerance)
    assert_same_lines(one, other, "metrics.jsonl", tolerance)
    assert_same_lines(one, other, "evaluations.jsonl", tolerance)


@pytest.mark.parametrize(
    ("job", "name", "tolerance"),
    [(0, "", 1e-5), (1, "-other", 5e-3)],  # Muon makes matrices orthogonal in bfloat16
    ids=["adamw", "muon"],
)
def test_two_processes_train_as_one(job: int, name: str, tolerance: float, place: Place, both: Any) -> None:
    assert both[job] == [{"status": 0, "said": ""}] * 2
    first, second = (load_file(place.path / f"gradients-{job}-{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second, 0.0)
    assert_same(load_file(place.path / f"one-{job}.safetensors"), first, 1e-5)
    assert_same_run(place.folder(f"one{name}"), place.folder(f"two{name}"), tolerance)
    assert any(line["segments"] not in (0, 4) for line in lines(place.folder(f"two{name}")))  # rows halt as they like
    about = [load_model(place.folder(f"{count}{name}"))[1] for count in ("one", "two")]
    assert about[0] == about[1]


def test_a_signal_to_one_process_stops_both_and_one_goes_on(place: Place, both: Any) -> None:
    assert [found["status"] for found in both[2]] == [130, 130]
    assert "stopped after step 4 of 6" in both[2][0]["said"]  # where both look at the metrics
    cut = place.folder("two-then-one")
    assert [line["step"] for line in lines(cut)] == [2, 4]
    assert run(["train", f"run.resume={cut}"])["status"] == 0
    assert_same_run(place.folder("one"), cut)


def test_two_processes_go_on_with_what_one_began(place: Place, both: Any) -> None:
    assert both[3] == [{"status": 0, "said": ""}] * 2
    found = load_checkpoint(checkpoints(place.folder("one-then-two"))[-1])[0]
    assert_same(load_checkpoint(checkpoints(place.folder("one"))[-1])[0], found, 1e-5)


def test_a_batch_that_cannot_be_dealt_out_is_refused(place: Place, both: Any) -> None:
    told = "train.batch_size is 7; it should be a multiple of the 2 processes"
    assert [found["status"] for found in both[4]] == [2, 2]
    assert both[4][0]["said"] == f"hrm: {told}\n" and both[4][1]["said"] == ""
    assert not (place.path / "refused").exists()


def test_a_loss_that_is_not_finite_stops_both(both: Any) -> None:
    assert [found["status"] for found in both[5]] == [1, 1]
    assert "not finite at step" in both[5][0]["said"] and both[5][0] == both[5][1]


# ---------------------------------------------------------------------------------------------------- the batches


def arc_grids() -> PuzzleSet:
    grids = [np.full((rows, 4), rows % 10, np.uint8) for rows in range(1, 9)]
    boards = np.stack([arc.framed(grid) for grid in grids])
    rows = np.arange(len(boards), dtype=np.int32)
    return PuzzleSet("arc", boards, boards, rows, rows, 12, (30, 30), len(boards))


MADE = {
    "sudoku": lambda: sudoku.generate(4, 30, 0, 0)[0].puzzles,
    "maze": lambda: maze.generate(8, 6, 0, 0)[0],
    "arc": arc_grids,
}


@pytest.mark.parametrize("task", MADE)
def test_shares_are_the_whole_batch(task: str) -> None:
    shown, easier = MADE[task](), 0.5 * (task == "sudoku")
    whole = BatchStream(shown, 12, seed=1, easier=easier).batch(5)
    parts = [BatchStream(shown, 12, seed=1, easier=easier, rank=rank, world=3).batch(5) for rank in range(3)]
    for name, array in whole.items():
        assert np.array_equal(array, np.concatenate([part[name] for part in parts])), name
