"""Two processes over gloo on the CPU: the same training as one, whatever the processes have to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_worker import batch, make_model
from safetensors.torch import load_file
from test_trainer import assert_same, steps, weights
from tiny_backbone import TINY_CORE, save_tiny_backbone

from hrm.saving import checkpoints

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny_backbone(folder / "backbone")
    rows = [{"prompt": "?" * (1 + n % 7), "answer": "yes " * (1 + n % 3)} for n in range(40)]
    rows += [{"prompt": f"held out {n}", "answer": "no"} for n in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(place: Path, name: str, processes: int, *words: str) -> Path:
    """Runs `hrm train` with so many processes; returns the run folder."""
    own = [f"hrm.backbone={place / 'backbone'}", *TINY_CORE, f"data.path={place / 'rows.jsonl'}", "data.held_out=1"]
    own += ["train.batch_size=4", "train.save_every=2", "eval.max_new_tokens=1"]
    own += ["train.core_lr=0.01", "train.adapter_lr=0.01", f"run.folder={place / name}"]
    launch("-m", "hrm", "train", *(words if words[0].startswith("run.resume") else [*own, *words]), processes=processes)
    (folder,) = (place / name).iterdir()
    return folder


def launch(*command: str, processes: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = TESTS.parents[1], TESTS, TESTS.parent  # the package before the folder of its tests, which is named alike
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    words = [*torchrun, "--nproc-per-node", str(processes), *command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    "words",
    [("hrm.segments=2", "train.micro_batch=1"), ("hrm.act=true", "hrm.max_segments=4", "hrm.min_segments=1")],
    ids=["segments", "act"],
)
def test_two_processes_train_as_one(place: Path, words: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    one, two = (train(place, f"{name}-{n}", n, "train.steps=6", *words) for n in (1, 2))
    assert_same(weights(one), weights(two), tolerance=2e-4)
    for a, b in zip(steps(one), steps(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_a_run_goes_on_with_another_number_of_processes(place: Path) -> None:
    straight = train(place, "straight", 1, "train.steps=6", "hrm.segments=2")
    cut = train(place, "cut", 2, "train.steps=6", "hrm.segments=2")
    newest = checkpoints(cut)[-1]
    assert sorted(path.name for path in newest.glob("rank-*.json")) == ["rank-0.json", "rank-1.json"]
    for path in newest.iterdir():  # as if it had been killed after step 4
        path.unlink()
    newest.rmdir()
    train(place, "cut", 1, f"run.resume={cut}")
    assert_same(weights(straight), weights(cut), tolerance=2e-4)
    assert [line["step"] for line in steps(cut)] == [1, 2, 3, 4, 5, 6]


def test_fsdp_gives_the_gradients_of_one_process_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    launch(str(TESTS / "fsdp_worker.py"), str(tmp_path), processes=2)
    model = make_model()
    ids, labels = batch()
    model(ids, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = load_file(tmp_path / "gradients.safetensors")
    assert_same(expected, found, tolerance=1e-4)
    assert torch.linalg.vector_norm(found["hrm.w_c"]) > 0
