"""Gemma 3n E4B in its real shape, trained for a few steps on a GPU of 24 GB: memory and tokens a second.

    python benchmarks/e4b_step.py make FOLDER             random weights in bfloat16, 14 GB; without a GPU, minutes
    python benchmarks/e4b_step.py run FOLDER [section.key=value ...] [--ways fused eager]

`run` lets this process have `--gpu-gb` of the GPU's memory, loads the backbone in 4 bits with adapters and a core of
2048/4096 as `hrm train` does, and takes `--steps` steps of 4 x 2048 random tokens with `HRMTrainer`, one row at a time.
One line of JSON for each way: the most that was allocated and reserved, what was planned and what is measured at the
peaks of one more step, median tokens a second after the first two steps, the last loss. Further keys: `hrm train`'s.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, TrainerCallback

from hrm.data import Encoded
from hrm.profile.command import plan_training
from hrm.profile.measure import measure_memory, text_vocabulary
from hrm.settings import TrainingSettings, load_settings
from hrm.train import load_model
from hrm.trainer import HRMTrainer, make_optimizer

SETTINGS = {
    "hrm": {"quantize": "nf4", "d_l": 2048, "d_h": 4096},
    "data": {"max_length": 2048},
    "train": {"batch_size": 4, "micro_batch": 1, "gradient_checkpointing": True, "optimizer": "adamw_8bit"},
}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size": 512, "head_dim": 64,
        "vocab_size_per_layer_input": 512, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]}  # fmt: skip


def make(folder: Path, tiny: bool) -> None:
    """Writes config and random weights."""
    config = Gemma3nTextConfig(**TINY if tiny else {})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters in {folder}")


@dataclass
class Seen(TrainerCallback):
    """What the Trainer logs."""

    lines: list[dict[str, Any]]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "tokens_per_second" in logs:
            self.lines.append(dict(logs))


def run(options: argparse.Namespace) -> None:
    """Loads once, trains once for each way, prints a line after each."""
    settings = load_settings(TrainingSettings, options.settings, SETTINGS)
    cuda = torch.cuda.is_available()
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.gpu_gb * 1e9 / total))
    settings.hrm.backbone = str(options.folder)
    started = time.perf_counter()
    model = load_model(str(options.folder), settings).train()
    loaded = {"loading_s": time.perf_counter() - started} | _memory(cuda, "loading_")
    draw = torch.Generator().manual_seed(0)
    shape = (4 * settings.train.batch_size, settings.data.max_length)
    ids = torch.randint(text_vocabulary(model.config), shape, generator=draw)
    rows = [Encoded(row[:1], row[1:]) for row in ids.tolist()]
    about = {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__}
    for way in options.ways:
        model.hrm.fused = way == "fused" and cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seen = Seen([])
        with tempfile.TemporaryDirectory() as folder:
            settings.train.save_every = options.steps + 1
            trainer = HRMTrainer(
                model, rows, settings.train, Path(folder), pad=0, steps=options.steps, callbacks=[seen]
            )  # fmt: skip
            trainer.train()
        line = {"way": way, **about, **loaded, **_memory(cuda, "")}
        plan = plan_training(settings, model.config.backbone)
        line |= {f"planned_{name}_gb": peak / 1e9 for name, peak in plan.peaks.items()}
        line["tokens_per_second"] = statistics.median(line["tokens_per_second"] for line in seen.lines[2:])
        line["last_loss"] = seen.lines[-1]["loss"]
        del trainer
        gc.collect()  # the Trainer holds itself in cycles
        if cuda:
            measured = measure_memory(model, plan.step, lambda: make_optimizer(model, settings.train))
            line |= {f"measured_{name}_gb": peak / 1e9 for name, peak in measured.peaks.items()}
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def _memory(cuda: bool, prefix: str) -> dict[str, float]:
    if not cuda:
        return {}
    return {f"{prefix}allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
            f"{prefix}reserved_gb": torch.cuda.max_memory_reserved() / 1e9}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*", help="section.key=value, as for hrm train")
    parser.add_argument("--ways", nargs="+", choices=["fused", "eager"], default=["fused", "eager"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--gpu-gb", type=float, default=24.0)
    parser.add_argument("--tiny", action="store_true", help="make a toy of the same kind, to try this script")
    options = parser.parse_intermixed_args()
    make(options.folder, options.tiny) if options.what == "make" else run(options)


if __name__ == "__main__":
    main()
