"""How training scales with the number of processes: `python benchmarks/scaling.py KEY=VALUE ... [options]`.

Runs `torchrun --nproc-per-node P -m hrm train KEY=VALUE ...` for every P, with the same batch (strong scaling) and with
P times that batch (weak scaling), and reads each run's metrics.jsonl:

    python benchmarks/scaling.py puzzle=sudoku data.path=train.npz train.steps=300 --processes 1 2 4
    python benchmarks/scaling.py hrm.backbone=FOLDER data.task=object_swaps train.steps=60 --processes 1 2

Results go to `--output` as JSON after each run, a table to the terminal; `--plot FILE` also draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hrm.puzzle.settings import load_puzzle_settings
from hrm.runs import METRICS, read_lines
from hrm.settings import load_training_settings

SPEEDS = {"examples_per_second": "examples/s", "tokens_per_second": "tokens/s"}
COMPARED = 50  # first steps whose losses are compared
# several GPUs of one host without NVLink's multicast, which not every container may use
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


def batch_size(words: Sequence[str]) -> int:
    """What `hrm train` with these words would take."""
    load = load_puzzle_settings if any(word.startswith("puzzle=") for word in words) else load_training_settings
    return load(words).train.batch_size


def torchrun(processes: int, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of `hrm train` with these words in so many processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    return [*launcher, "-m", "hrm", "train", *words], {"OMP_NUM_THREADS": threads, **os.environ, **ENVIRONMENT}


def measure(words: Sequence[str], processes: int, batch: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about steps that one run with so many processes and rows in a batch writes.

    Raises:
        RuntimeError: the run failed; with the end of what it said.
    """
    words = [*(word for word in words if not word.startswith("train.batch_size=")), f"train.batch_size={batch}"]
    with tempfile.TemporaryDirectory() as folder:
        command, environment = torchrun(processes, [*words, f"run.folder={folder}"])
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
        (run,) = Path(folder).iterdir()
        return [line for line in read_lines(run / METRICS) if any(speed in line for speed in SPEEDS)]


def summary(lines: Sequence[dict[str, Any]], skipped: int) -> dict[str, Any]:
    """Median speed over the lines after the first `skipped` (fewer where there are not so many), peak memory, losses of
    the first steps."""
    speed = next(name for name in SPEEDS if name in lines[0])
    late = lines[min(skipped, len(lines) - 1) :]
    return {
        "unit": SPEEDS[speed],
        "speed": statistics.median(line[speed] for line in late),
        "lines": len(late),
        "memory_gb": max(line["memory_gb"] for line in lines),
        "losses": {line["step"]: line["loss"] for line in lines if line["step"] <= COMPARED},
    }


def compare(runs: Sequence[dict[str, Any]]) -> None:
    """Adds to each run its efficiency, and, where the batches are the same, how far its losses are from those of the
    fewest processes with its kind of scaling."""
    for run in runs:
        base = min((r for r in runs if r["scaling"] == run["scaling"]), key=lambda r: r["processes"])
        run["efficiency"] = run["speed"] / base["speed"] * base["processes"] / run["processes"]
        if run["batch_size"] == base["batch_size"]:
            shared = run["losses"].keys() & base["losses"].keys()
            differences = (abs(run["losses"][step] - base["losses"][step]) for step in shared)
            run["loss_difference"] = max(differences, default=None)


def show(runs: Sequence[dict[str, Any]], console: Console) -> None:
    """A line a run: P processes, and the most memory of the first of them."""
    table = Table()
    for column in ("scaling", "P", "batch", runs[0]["unit"], "efficiency", "GB", f"loss ({COMPARED} steps)"):
        table.add_column(column, justify="left" if column == "scaling" else "right")
    for run in runs:
        difference = run.get("loss_difference")
        table.add_row(
            run["scaling"], str(run["processes"]), str(run["batch_size"]), f"{run['speed']:,.1f}",
            f"{run['efficiency']:.0%}", f"{run['memory_gb']:.2f}", "" if difference is None else f"± {difference:.2g}",
        )  # fmt: skip
    console.print(table)


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed over processes, measured and ideal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for scaling in dict.fromkeys(run["scaling"] for run in runs):
        own = sorted((run for run in runs if run["scaling"] == scaling), key=lambda run: run["processes"])
        counts, speeds = [run["processes"] for run in own], [run["speed"] for run in own]
        (line,) = axes.plot(counts, speeds, "o-", label=f"{scaling} scaling")
        ideal = [speeds[0] * count / counts[0] for count in counts]
        axes.plot(counts, ideal, ":", color=line.get_color(), label="ideal")
    axes.set(xlabel="processes", ylabel=runs[0]["unit"], xticks=sorted({run["processes"] for run in runs}))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="KEY=VALUE", help="of `hrm train`")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--scaling", nargs="+", default=["strong", "weak"], choices=["strong", "weak"])
    parser.add_argument("--skip", type=int, default=3, help="first lines of metrics.jsonl left out of the speed")
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--plot", type=Path)
    return parser.parse_intermixed_args()


def main() -> None:
    options, console = parse(), Console()
    rows = batch_size(options.words)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    runs: list[dict[str, Any]] = []
    found: dict[tuple[int, int], dict[str, Any]] = {}
    results = {"words": options.words, "device": device, "torch": torch.__version__, "runs": runs}
    for scaling in options.scaling:
        for count in options.processes:
            batch = rows * count if scaling == "weak" else rows
            if (count, batch) not in found:  # one process is the same run for both kinds
                found[count, batch] = summary(measure(options.words, count, batch), options.skip)
            runs.append({"scaling": scaling, "processes": count, "batch_size": batch, **found[count, batch]})
            compare(runs)
            options.output.write_text(json.dumps(results, indent=1))
            speed = f"{runs[-1]['speed']:,.1f} {runs[-1]['unit']}"
            console.print(f"{scaling}, {count} processes: {speed}", highlight=False)
    show(runs, console)
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
