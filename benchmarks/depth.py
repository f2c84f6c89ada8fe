"""Does the core help? Arms of equal training time on problems of known depth: `python benchmarks/depth.py BACKBONE`.

Arms, all with the two adapters, the same rows, batches and learning rates:

    lora        the adapters alone; the core is not run
    control     the core at N = T = 1: the same parameters, no depth
    one-step    N x T, the gradient of one step (1/1)
    ramp        N x T, the gradient of the whole last cycle (T/1), depth growing in the first half of the time
    full        N x T, the gradient of all cycles (T/N), the only one that reaches other tokens through the core
    segments    ramp, and up to 4 segments under ACT

Every arm and seed trains for `--seconds` of wall time on one device (or `--steps` steps), learning rates and depth as
functions of the time spent. Then its answers to unseen problems are judged by depth, trained ones and deeper, and again
with other N, T and numbers of segments than it was trained with. Results go to `--output` as JSON after each run, a
table to the terminal; `--plot` draws a finished file, `--merge` joins some.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed

from hrm import HRMGemmaForCausalLM
from hrm.batching import BatchPlan, micro_batches, scored_tokens
from hrm.curriculum import set_depth, stages
from hrm.data import Encoded, Example, Template, encode
from hrm.evaluate import predict
from hrm.loss import IGNORED, linear_cross_entropy, next_token_targets
from hrm.tasks import OPTIONS, problems
from hrm.train import load_tokenizer
from hrm.trainer import lr_factor, make_optimizer


@dataclass(frozen=True)
class Arm:
    """What one arm trains, and at which depths it is judged beside its own."""

    core: dict[str, Any] | None  # in place of the default core's; None: the core is not run
    ramp: tuple[tuple[float, int, int], ...] = ()
    judged: tuple[tuple[int, int, int], ...] = field(default=())  # N, T, segments
    full: bool = False  # whether all cycles and steps carry gradient, whatever N and T are


DEEPER = ((1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 4, 1), (4, 8, 1), (4, 4, 2), (4, 4, 4))
RAMP = ((0.25, 1, 2), (0.5, 2, 4))
ACT = {"act": True, "max_segments": 4, "exploration": 0.2, "segments": 1}
ARMS = {
    "lora": Arm(None),
    "control": Arm({"h_cycles": 1, "l_steps": 1}),
    "one-step": Arm({}, judged=DEEPER),
    "ramp": Arm({"grad_l_steps": 4}, RAMP, DEEPER),
    "full": Arm({}, judged=DEEPER, full=True),
    "segments": Arm({"grad_l_steps": 4, **ACT}, RAMP, DEEPER),
}
NOT_KEPT = ("output", "plot", "merge", "backbone")
CORE = {"d_l": 1280, "d_h": 1280, "h_cycles": 4, "l_steps": 4}


@dataclass
class Rates:
    """What `make_optimizer` reads."""

    core_lr: float
    adapter_lr: float
    weight_decay: float = 0.0
    optimizer: str = "adamw"


class Run:
    """One arm with one seed."""

    def __init__(self, options: argparse.Namespace, name: str, seed: int) -> None:
        self.options, self.arm, self.seed = options, ARMS[name], seed
        set_seed(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        backbone = AutoModelForCausalLM.from_pretrained(options.backbone, dtype=half).to(self.device)
        core = {**CORE, **json.loads(options.core), **(self.arm.core or {})}
        if self.arm.full:
            core |= {"grad_cycles": core["h_cycles"], "grad_l_steps": core["l_steps"]}
        self.model = HRMGemmaForCausalLM.from_backbone(backbone, hrm=core).train()
        if self.arm.core is None:
            self.model.hrm.requires_grad_(False)
        self.optimizer = make_optimizer(self.model, Rates(options.core_lr, options.adapter_lr))
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.full = self.model.hrm.config.from_dict(self.model.hrm.config.to_dict())
        self.steps = 0

    def train(self, rows: Sequence[Encoded], pad: int) -> dict[str, float]:
        """Steps until the time is spent; returns steps, seconds and the mean loss of the last tenth."""
        options, losses = self.options, []
        plan = BatchPlan([len(r.prompt) for r in rows], batch_size=options.batch_size, steps=10**6, seed=self.seed)
        depth = stages(self.arm.ramp, 10**6, self.full.h_cycles, self.full.l_steps)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        began = None
        for places in plan:
            if self.steps == 3 or (began is None and options.steps):  # kernels are compiled, memory is there
                began = self._now()
            share = self._share(began)
            if share >= 1:
                break
            set_depth(self.model.hrm.config, self.full, depth, int(share * 10**6))
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * lr_factor(int(share * 1000), 1000, 0.05)
            losses.append(self._step([rows[place.row] for place in places], pad, parameters))
            self.steps += 1
        tail = [float(loss) for loss in losses[-max(1, len(losses) // 10) :]]
        return {"steps": self.steps, "seconds": self._now() - (began or 0), "loss": statistics.fmean(tail)}

    def _share(self, began: float | None) -> float:
        """How much of the training is over."""
        if self.options.steps:
            return self.steps / self.options.steps
        return 0.0 if began is None else (self._now() - began) / self.options.seconds

    def _step(self, rows: Sequence[Encoded], pad: int, parameters: Sequence[Tensor]) -> Tensor:
        items, total = scored_tokens(rows), torch.zeros((), device=self.device)
        for part in micro_batches(rows, self.options.micro_batch, pad, pack=False):
            part = {name: tensor.to(self.device) for name, tensor in part.items()}
            with self._autocast():
                loss = self._loss(part, items)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _loss(self, part: dict[str, Tensor], items: int) -> Tensor:
        model = self.model
        if self.arm.core is not None:
            output = model(**part, num_items_in_batch=items)
            assert output.loss is not None
            return output.loss
        decoder = model.get_decoder()
        h = decoder(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False)[0]
        targets = next_token_targets(part["labels"], part["attention_mask"])
        scored = targets != IGNORED
        size = model.config.get_text_config().vocab_size
        return linear_cross_entropy(h[scored], targets[scored], model._logits, size, frozen=True).loss.sum() / items

    def judge(self, rows: Sequence[Encoded], depths: Sequence[int], pad: int) -> dict[str, dict[int, float]]:
        """Share of right answers by depth: as trained, and with each N, T, segments of the arm's list."""
        config, found = self.model.hrm.config, {}
        for how in ("trained", *self.arm.judged):
            for name, value in self.full.to_dict().items():
                setattr(config, name, value)
            segments = None
            if how != "trained":
                config.h_cycles, config.l_steps, segments = how
                config.grad_cycles = config.grad_l_steps = 1
            with self._without_core() if self.arm.core is None else nullcontext():
                right = predict(self.model, rows, pad, batch_size=self.options.micro_batch, segments=segments)
            found["trained" if how == "trained" else "N{} T{} M{}".format(*how)] = by_depth(right, depths)
        return found

    @contextmanager
    def _without_core(self) -> Iterator[None]:
        """The core's read-out is still zero, so that the model is its backbone; only its time is saved."""
        core, self.model.hrm.config.h_cycles, self.model.hrm.config.l_steps = self.full, 1, 1
        yield
        self.model.hrm.config.h_cycles, self.model.hrm.config.l_steps = core.h_cycles, core.l_steps

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def by_depth(right: Sequence[bool], depths: Sequence[int]) -> dict[int, float]:
    """Share of right answers at each depth."""
    return {
        depth: statistics.fmean(ok for ok, of in zip(right, depths, strict=True) if of == depth)
        for depth in sorted(set(depths))
    }


def make_rows(options: argparse.Namespace, tokenizer: Any) -> tuple[list[Encoded], list[Encoded], list[int]]:
    """Rows to train on, rows to judge by, and the depths of these; no prompt is in both."""
    trained = {"objects": options.objects, "max_depth": options.max_depth}
    judged: dict[str, tuple[str, int]] = {}
    for depth in options.judge_depths:
        own = {"objects": options.objects, "min_depth": depth, "max_depth": depth}
        for prompt, answer, _ in problems(options.task, own, 10**6 + depth):
            judged.setdefault(prompt, (answer, depth))
            if sum(of == depth for _, of in judged.values()) == options.judged:
                break
    train: list[Example] = []
    for prompt, answer, depth in problems(options.task, trained, 0):
        if prompt not in judged:
            train.append(Example(prompt, answer, "made", {"depth": depth}))
        if len(train) == options.rows:
            break
    held_out = [Example(prompt, answer, "made") for prompt, (answer, _) in judged.items()]
    template = Template("{prompt} {answer}")
    encoded = [encode(examples, template, tokenizer, 512) for examples in (train, held_out)]
    return encoded[0], encoded[1], [depth for _, depth in judged.values()]


# ---------------------------------------------------------------------------------------------------- what is shown


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval (Student's t); the latter is nan for one value."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}.get(len(values), 2.3)
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs of several files, made with the same settings but for arms and seeds, in one."""
    own = ("arms", "seeds", "runs")
    for part in parts[1:]:
        for key in part.keys() - own:
            if part[key] != parts[0][key]:
                raise SystemExit(f"--merge: {key} is {part[key]!r} in one file and {parts[0][key]!r} in another")
    runs = sorted((run for part in parts for run in part["runs"]), key=lambda run: list(ARMS).index(run["arm"]))
    return {
        **parts[0],
        **{key: sorted({value for part in parts for value in part[key]}) for key in own[:2]},
        "runs": runs,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Accuracy by depth of each arm as it was trained, then with other depths at test time."""
    runs = results["runs"]
    depths = sorted({int(depth) for run in runs for depth in run["judged"]["trained"]})
    table = Table(title=f"{results['task']}: right answers, %, by depth (trained to {results['max_depth']})")
    for column in ("arm", "N T M", "steps", "seeds", *map(str, depths)):
        table.add_column(column)
    for name in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == name]
        for how in own[0]["judged"]:
            cells = []
            for depth in depths:
                mean, half = interval([100 * run["judged"][how][str(depth)] for run in own])
                cells.append(f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}")
            steps = f"{statistics.fmean(run['steps'] for run in own):.0f}"
            table.add_row(name, how, steps, str(len(own)), *cells)
    console.print(table)


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy over depth, a line an arm as it was trained, seeds as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(run["arm"] for run in results["runs"]):
        own = [run["judged"]["trained"] for run in results["runs"] if run["arm"] == name]
        depths = sorted(map(int, own[0]))
        means = [100 * statistics.fmean(run[str(depth)] for run in own) for depth in depths]
        (line,) = axes.plot(depths, means, label=name)
        for run in own:
            axes.plot(depths, [100 * run[str(depth)] for depth in depths], ".", color=line.get_color(), markersize=4)
    axes.axvline(results["max_depth"], color="grey", linestyle=":", label="deepest trained")
    axes.set(xlabel="depth of the problem", ylabel="right answers, %", ylim=(0, 102), title=results["task"])
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", nargs="?", help="folder or name of a causal language model")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--steps", type=int, help="in place of --seconds")
    parser.add_argument("--task", default="object_swaps", choices=list(OPTIONS))
    parser.add_argument("--objects", type=int, help="default: the task's")
    parser.add_argument("--max-depth", type=int, default=10)
    parser.add_argument("--judge-depths", nargs="+", type=int, default=[2, 4, 6, 8, 10, 12, 14, 16])
    parser.add_argument("--judged", type=int, default=250, help="problems of each depth")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--core", default="{}", help="fields of the core as JSON, in place of the default ones")
    parser.add_argument("--core-lr", type=float, default=2e-4)
    parser.add_argument("--adapter-lr", type=float, default=5e-4)
    parser.add_argument("--output", type=Path, default=Path("depth.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--merge", nargs="+", type=Path, help="files of arms or seeds that ran side by side")
    options, console = parser.parse_args(), Console()
    options.objects = options.objects or OPTIONS[options.task]["objects"]
    if options.merge:
        results = merged([json.loads(path.read_text()) for path in options.merge])
        options.output.write_text(json.dumps(results, indent=1))
        show(results, console)
        return
    if options.plot:
        plot(json.loads(options.output.read_text()), options.plot)
        return
    tokenizer = load_tokenizer(options.backbone)
    rows, judged, depths = make_rows(options, tokenizer)
    about = {key: value for key, value in vars(options).items() if key not in NOT_KEPT}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {**about, "device": device, "torch": torch.__version__, "runs": []}
    for seed in options.seeds:
        for name in options.arms:
            run = Run(options, name, seed)
            trained = run.train(rows, tokenizer.pad_token_id)
            found = run.judge(judged, depths, tokenizer.pad_token_id)
            results["runs"].append({"arm": name, "seed": seed, **trained, "judged": found})
            options.output.write_text(json.dumps(results, indent=1))
            results = json.loads(options.output.read_text())  # depths as text, as the file has them
            console.print(f"{name} seed {seed}: {trained} {found['trained']}", highlight=False)
    show(results, console)


if __name__ == "__main__":
    main()
