"""Kills a small training at random moments, resumes it each time, and compares it with one that nothing stopped.

`python tests/hrm/kill_often.py [TIMES]`; about six seconds a time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from tiny_backbone import TINY_CORE, save_tiny_backbone  # noqa: E402

from hrm.saving import checkpoints  # noqa: E402

STEPS = 400


def train(*words: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hrm", "train", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"event": "step"') if path.is_file() else 0


def main(times: int) -> None:
    place, draw = Path(tempfile.mkdtemp()), random.Random(0)
    save_tiny_backbone(place / "backbone")
    rows = [{"prompt": "?" * (1 + n % 7), "answer": "yes " * (1 + n % 3)} for n in range(42)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"hrm.backbone={place / 'backbone'}", *TINY_CORE, f"data.path={place / 'rows.jsonl'}", "hrm.act=true",
             "hrm.max_segments=3", "hrm.exploration=0.3", "hrm.q_target=replay", f"train.steps={STEPS}",
             "train.batch_size=4", "train.save_every=3", "eval.max_new_tokens=1", "data.held_out=1"]  # fmt: skip
    assert train(*words, f"run.folder={place / 'straight'}").wait() == 0
    (straight,) = (place / "straight").iterdir()
    process = train(*words, f"run.folder={place / 'killed'}")
    for number in range(times):
        while process.poll() is None and not any((place / "killed").glob("*/metrics.jsonl")):
            time.sleep(0.05)
        (folder,) = (place / "killed").iterdir()
        before = lines(folder)
        while process.poll() is None and lines(folder) == before:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error.decode()[-2000:]
        newest = checkpoints(folder)[-1].name if checkpoints(folder) else "none"
        print(f"kill {number + 1}: {lines(folder)} steps logged, newest checkpoint {newest}", flush=True)
        process = train(f"run.resume={folder}")
    assert process.wait() == 0
    one, other = (load_file(checkpoints(f)[-1] / "model.safetensors") for f in (straight, folder))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()
               if '"event": "step"' in line] for f in (straight, folder)]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    print(f"{times} kills: weights and all {STEPS} losses are those of the run that nothing stopped")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
