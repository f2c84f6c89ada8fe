"""Kills one process of several in the middle of training: `python benchmarks/killed_process.py KEY=VALUE ...`.

Runs `torchrun --nproc-per-node P -m hrm train KEY=VALUE ...`, sends SIGKILL to one process once a step above `--after`
is logged, and goes on from the newest checkpoint with `--resume` processes:

    python benchmarks/killed_process.py puzzle=sudoku data.path=train.npz train.steps=400 train.save_every=50 \\
        train.log_every=5 --after 130 --resume 1

One line of JSON: how many seconds later everything had ended, what torchrun said of it, the checkpoint that was gone on
from, and how far the losses of the steps that were done twice differ.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from scaling import torchrun

from hrm.runs import METRICS, read_lines
from hrm.saving import checkpoints

LONGEST = 120  # seconds that the other processes may take to end
TOLD = ("rank  ", "exitcode  ", "Signal", "Root Cause")


def losses(run: Path) -> dict[int, float]:
    """Loss of each logged step, the last where there are several."""
    return {line["step"]: line["loss"] for line in read_lines(run / METRICS) if "loss" in line}


def workers(launcher: int) -> dict[int, int]:
    """Process number of each rank that torchrun, process `launcher`, has started (Linux)."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for pid in (task / "children").read_text().split():
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            ranks = [int(value[5:]) for value in variables if value.startswith("RANK=")]
            found |= {rank: int(pid) for rank in ranks}
    return found


def kill_one(process: subprocess.Popen, folder: Path, options: argparse.Namespace) -> tuple[Path, float]:
    """Waits for the step, kills one process, and waits for the others; returns the run's folder and how long they took.

    Raises:
        RuntimeError: training ended before that step, or the others do not end.
    """
    while not any(step > options.after for run in folder.glob("*") for step in losses(run)):
        if process.poll() is not None:
            raise RuntimeError(f"training ended before a step above {options.after} was logged")
        time.sleep(0.02)
    ranks = workers(process.pid)
    os.kill(ranks[options.rank], signal.SIGKILL)
    killed = time.perf_counter()
    try:
        process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        for pid in (*ranks.values(), process.pid):
            os.kill(pid, signal.SIGKILL)
        raise RuntimeError(f"the others still run {LONGEST} s after process {options.rank} was killed") from None
    (run,) = folder.iterdir()
    return run, time.perf_counter() - killed


def measure(options: argparse.Namespace, folder: Path, log: IO[bytes]) -> dict[str, Any]:
    """Trains, kills, goes on; what the text above says."""
    command, environment = torchrun(options.processes, [*options.words, f"run.folder={folder}"])
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    run, seconds = kill_one(process, folder, options)
    before, newest = losses(run), checkpoints(run)[-1]
    said = [line.strip() for line in Path(log.name).read_text().splitlines() if any(word in line for word in TOLD)]
    command, environment = torchrun(options.resume, [f"run.resume={run}"])
    subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    start, after = int(newest.name.rpartition("-")[2]), losses(run)
    twice = [step for step in before if step > start]
    return {
        "processes": options.processes, "killed": options.rank, "seconds_to_end": round(seconds, 1),
        "status": process.returncode, "said": said, "from": newest.name, "resumed_with": options.resume,
        "last_step": max(after), "steps_done_twice": len(twice),
        "loss_difference": max((abs(before[step] - after[step]) for step in twice), default=None),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="KEY=VALUE", help="of `hrm train`")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rank", type=int, default=1, help="of the process that is killed")
    parser.add_argument("--after", type=int, default=20, help="step")
    parser.add_argument("--resume", type=int, default=2, help="processes that go on")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(suffix=".txt") as log:
        print(json.dumps(measure(options, Path(folder), log)))


if __name__ == "__main__":
    main()
