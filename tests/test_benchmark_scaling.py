"""The scaling benchmark: what it makes of the lines that runs leave."""

from pathlib import Path

import pytest
import scaling


def run(kind: str, processes: int, batch: int, speed: float, loss: float) -> dict:
    lines = [{"step": 10, "loss": 2.0, "examples_per_second": 1.0, "memory_gb": 1.0}]
    lines += [
        {"step": step, "loss": loss, "examples_per_second": speed, "memory_gb": 2.0} for step in range(20, 100, 10)
    ]
    return {"scaling": kind, "processes": processes, "batch_size": batch, **scaling.summary(lines, 1)}


def test_efficiency_and_losses_against_the_fewest_processes(tmp_path: Path) -> None:
    runs = [run("strong", 1, 8, 100.0, 1.0), run("strong", 2, 8, 150.0, 1.25), run("weak", 2, 16, 190.0, 0.5)]
    runs.append(run("weak", 1, 8, 100.0, 1.0))
    scaling.compare(runs)
    assert [r["speed"] for r in runs] == [100, 150, 190, 100] and runs[0]["memory_gb"] == 2.0
    assert [r["efficiency"] for r in runs] == pytest.approx([1, 0.75, 0.95, 1])
    assert runs[1]["loss_difference"] == 0.25 and "loss_difference" not in runs[2]  # other batches, other losses
    assert list(runs[0]["losses"]) == [10, 20, 30, 40, 50]
    scaling.plot(runs, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "expected"), [(["puzzle=sudoku-4x4", "train.batch_size=24"], 24), (["train.batch_size=6"], 6)]
)
def test_batch_size_is_that_of_the_words(words: list[str], expected: int) -> None:
    assert scaling.batch_size(words) == expected
