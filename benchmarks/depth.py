"""Does the core help? Arms of equal training time on problems of known depth: `python benchmarks/depth.py BACKBONE`.

Arms, all with the two adapters, the same rows, batches and learning rates:

    lora        the adapters alone; the core is not run
    control     the core at N = T = 1: the same parameters, no depth
    one-step    N x T, the gradient of one step (1/1)
    ramp        N x T, the gradient of the whole last cycle (T/1), depth growing in the first half of the time
    full        N x T, the gradient of all cycles (T/N), the only one that reaches other tokens through the core
    segments    the same N cycles as `--segments` segments: each has a loss of its own, and its gradient reaches all of
                its own cycles
    act         the same under ACT, where halted rows are computed on, as a CUDA graph has to, and not scored

With `--core-from SHARE` the adapters have that share of the training to themselves before the core is put on;
with `--hand-over` they stop there. With `--at LAYER` the core stands behind that layer of the backbone, and the layers
after it run once on what it gives (single segments alone).

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
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from recording import record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hrm import HRMConfig, HRMCore, HRMGemmaForCausalLM
from hrm.batching import BatchPlan
from hrm.curriculum import set_depth, stages
from hrm.data import Encoded, Example, Template, collate, encode
from hrm.evaluate import Depth, predict
from hrm.loss import IGNORED, next_token_targets, q_loss, token_mean
from hrm.tasks import OPTIONS, texts
from hrm.train import load_tokenizer
from hrm.trainer import lr_factor, make_optimizer


@dataclass(frozen=True)
class Arm:
    """What one arm trains."""

    core: dict[str, Any] | None  # in place of the default core's; None: the core is not run
    reach: str = "step"  # of the gradient: the last step, the last cycle, or all
    ramp: bool = False  # whether depth grows in the first half of the time
    cut: bool = False  # whether the cycles are cut into segments


ACT = {"act": True, "exploration": 0.2}
ARMS = {
    "lora": Arm(None),
    "control": Arm({"h_cycles": 1, "l_steps": 1}),
    "one-step": Arm({}),
    "ramp": Arm({}, "cycle", ramp=True),
    "full": Arm({}, "all"),
    "segments": Arm({}, "all", cut=True),
    "act": Arm(ACT, "all", cut=True),
}
NOT_KEPT = ("output", "plot", "merge", "backbone")
NO_CORE = {"d_l": 64, "d_h": 64, "h_cycles": 1, "l_steps": 1}  # at the end, where another stands inside
CORE = {"d_l": 1280, "d_h": 1280, "h_cycles": 4, "l_steps": 4}


@dataclass
class Rates:
    """What `make_optimizer` reads."""

    core_lr: float
    adapter_lr: float
    weight_decay: float = 0.0
    optimizer: str = "adamw"


def load(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The backbone, or its first layers and its final norm."""
    config = AutoConfig.from_pretrained(options.backbone)
    if options.layers is not None:
        config.num_hidden_layers = options.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: options.layers]
    return AutoModelForCausalLM.from_pretrained(options.backbone, config=config, dtype=dtype)


class Asked(NamedTuple):
    """A row as `collate` takes it, without the end of the text: only answers are learnt."""

    tokens: list[int]
    labels: list[int]

    @classmethod
    def of(cls, row: Encoded) -> Asked:
        """`row` but for its last token."""
        return cls(row.tokens[:-1], row.labels[:-1])


class Batches:
    """All training rows on one device, padded at the end to one width, so that every step has the same shapes."""

    def __init__(self, rows: Sequence[Asked], size: int, pad: int, seed: int, device: torch.device) -> None:
        ids, _, labels = collate(rows, pad)
        self.ids, self.labels, self.size = ids.to(device), labels.to(device), size
        targets, width = next_token_targets(self.labels, None), ids.shape[1]
        scored = targets != IGNORED
        assert (scored.sum(1) == scored[0].sum()).all()  # as many questions in each row
        self.places = scored.nonzero()[:, 1].view(len(rows), -1)
        self.targets = targets.gather(1, self.places)
        self._plan = BatchPlan([width] * len(rows), batch_size=size, steps=0, seed=seed)

    def __iter__(self) -> Iterator[Tensor]:
        """The places of `size` rows each, on the CPU: every row once before any comes again, without end."""
        for batch in count():
            yield torch.tensor(self._plan.rows(batch))


class Whitening:
    """h -> decorrelated, centred coordinates of equal power, fitted to a sample of hidden states; for `--whiten`.

    Directions with less than a thousandth of the mean power are lifted no further than that.
    """

    def __init__(self, h: Tensor) -> None:
        x = (h / h.pow(2).mean(-1, keepdim=True).sqrt()).flatten(0, -2).double()
        self.mean = x.mean(0)
        power, directions = torch.linalg.eigh(torch.cov((x - self.mean).T))
        self.map = (directions * (power + 1e-3 * power.mean()).rsqrt()) @ directions.T
        self.mean, self.map = self.mean.float(), self.map.float()

    def __call__(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            x = h.float() / h.float().pow(2).mean(-1, keepdim=True).sqrt()
            return ((x - self.mean) @ self.map).to(h.dtype)


class Inside(torch.nn.Module):
    """A layer of the backbone and a core behind it, in place of the layer.

    What the core gives is added in units of the hidden state's own size, which grows from layer to layer. A module of
    its own, since a compiled backbone takes a layer with a hook for the same as one without.
    """

    def __init__(self, layer: torch.nn.Module, core: HRMCore) -> None:
        super().__init__()
        self.layer, self.core = layer, core

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        h = self.layer(*args, **kwargs)
        size = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
        return h + self._read(h) * size.to(h.dtype)

    @torch.compiler.disable  # the core's kernels launch themselves
    def _read(self, h: Tensor) -> Tensor:
        return self.core.read_out(torch.zeros_like(h), self.core(h).z_h)


class Run:
    """One arm with one seed."""

    def __init__(self, options: argparse.Namespace, name: str, seed: int) -> None:
        self.options, self.arm, self.seed = options, ARMS[name], seed
        set_seed(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        backbone = load(options, half).to(self.device)
        core = {**CORE, **json.loads(options.core), **(self.arm.core or {})}
        if self.arm.cut:
            most = options.segments
            core |= {"h_cycles": core["h_cycles"] // most, "max_segments": most}
            core["segments"] = 1 if core.get("act") else most
        core["grad_l_steps"] = 1 if self.arm.reach == "step" else core["l_steps"]
        core["grad_cycles"] = core["h_cycles"] if self.arm.reach == "all" else 1
        self._last = options.at is None and self.arm.core is not None  # the model's own core is the one that is run
        own = core if options.at is None else NO_CORE
        self.model = HRMGemmaForCausalLM.from_backbone(backbone, hrm=own, lora=not options.frozen).train()
        self.core = self.model.hrm
        if not self._last:
            self.core.requires_grad_(False)
        self.optimizer = make_optimizer(self.model, Rates(options.core_lr, options.adapter_lr))
        if options.at is not None and self.arm.core is not None:
            self.core = self._inside(core, options.at)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.full = self.core.config.from_dict(self.core.config.to_dict())
        own_parameters = set(self.core.parameters())
        self._of_core = [group["params"][0] in own_parameters for group in self.optimizer.param_groups]
        self._started = False  # whether the core is run yet
        self.steps, self._replayed = 0, None
        decoder = self.model.get_decoder()
        on_gpu = self.device.type == "cuda"
        self._compiled = torch.compile(decoder.forward, dynamic=False) if on_gpu else decoder.forward

    def _inside(self, core: dict[str, Any], at: int) -> HRMCore:
        """A core behind layer `at`, in the optimizer."""
        inside = HRMCore(HRMConfig(**core, hidden_size=self.model.hrm.config.hidden_size)).to(self.device)
        self.optimizer.add_param_group({"params": list(inside.parameters()), "lr": self.options.core_lr})
        layers = self.model.get_decoder().layers
        layers[at - 1] = Inside(layers[at - 1], inside)
        return inside

    def train(self, batches: Batches) -> dict[str, Any]:
        """Steps until the time is spent; returns steps, seconds and the mean loss of each twentieth of the steps."""
        decoder = self.model.get_decoder()
        decoder.forward = self._compiled
        try:
            return self._train(batches)
        finally:
            del decoder.forward  # judged as it is: one shape a batch there
            self._replayed = None

    @torch.no_grad()
    def _whiten(self, batches: Batches) -> None:
        """What the core reads is whitened from now on; the read-out is still added to the backbone's own state."""
        ids, decoder = batches.ids[:256], self.model.get_decoder()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            h = type(decoder).forward(decoder, input_ids=ids, use_cache=False).last_hidden_state.float()
        real = torch.arange(ids.shape[1], device=ids.device) <= batches.places[: len(ids)].amax(1, keepdim=True)
        whitening = Whitening(h[real])
        self.core.register_forward_pre_hook(lambda core, given: (whitening(given[0]), *given[1:]))

    def _train(self, batches: Batches) -> dict[str, Any]:
        options, losses = self.options, []
        n, t = self.full.h_cycles, self.full.l_steps
        ramp = ((0.25, 1, max(1, t // 2)), (0.5, max(1, n // 2), t)) if self.arm.ramp else ()
        depth = stages(ramp, 10**6, n, t)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        seconds, began = 0.0, self._now()
        for chosen in batches:
            share = self.steps / options.steps if options.steps else seconds / options.seconds
            if share >= 1:
                break
            config, before = self.core.config, self._depth()
            set_depth(config, self.full, depth, int(share * 10**6))
            starts = not self._started and share >= options.core_from
            if starts:
                self._started = True
                if options.hand_over and self.arm.core is not None:
                    self._freeze_adapters()
                if options.whiten and self.arm.core is not None:
                    self._whiten(batches)
                seconds = self._now() - began
            if self.steps == 0 or starts or self._depth() != before:
                self._prepare(batches)
                began = self._now() - seconds  # compiling and recording are no training
            for group, peak, of_core in zip(self.optimizer.param_groups, self.peaks, self._of_core, strict=True):
                group["lr"] = peak * lr_factor(int(self._share(share, of_core) * 1000), 1000, 0.05)
            losses.append(self._step(batches, chosen, parameters))
            self.steps += 1
            seconds = (self._now() if self.steps % 8 == 0 else time.perf_counter()) - began
        if self._started and self.arm.core is not None and self.core.w_out.grad is None:
            raise RuntimeError(f"{self.options.output}: the core of this arm was never run in training")
        parts = torch.stack(losses).tensor_split(min(20, len(losses)))
        return {"steps": self.steps, "seconds": seconds, "losses": [round(part.mean().item(), 4) for part in parts]}

    def _share(self, share: float, of_core: bool) -> float:
        """How much of the core's or of the adapters' own training is over."""
        first = self.options.core_from
        if of_core:
            return max(0.0, share - first) / (1 - first)
        return min(1.0, share / first) if self.options.hand_over and self.arm.core is not None else share

    def _freeze_adapters(self) -> None:
        for group, of_core in zip(self.optimizer.param_groups, self._of_core, strict=True):
            for parameter in () if of_core else group["params"]:
                parameter.requires_grad_(False).grad = None

    def _depth(self) -> tuple[int, ...]:
        config = self.core.config
        return config.h_cycles, config.l_steps, config.grad_cycles, config.grad_l_steps

    def _prepare(self, batches: Batches) -> None:
        """Compiles the backbone and records forward and backward pass in a CUDA graph, or the GPU waits for Python."""
        self._replayed = None
        if self.device.type != "cuda":
            return
        self._chosen = torch.arange(batches.size, device=self.device)

        def work() -> Tensor:
            self.optimizer.zero_grad()  # gradients of the graph's own memory, not of what ran before it
            return self._backward(batches, self._chosen)

        self._replayed, self._loss = record(work)

    def _step(self, batches: Batches, chosen: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        if self._replayed is None:
            self.optimizer.zero_grad()
            loss = self._backward(batches, chosen.to(self.device))
        else:
            self._chosen.copy_(chosen, non_blocking=True)
            self._replayed.replay()  # which overwrites the gradients
            loss = self._loss.clone()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        return loss

    def _backward(self, batches: Batches, chosen: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self._loss_of(batches.ids[chosen], batches.places[chosen], batches.targets[chosen].flatten())
        loss.backward()
        return loss.detach()

    def _loss_of(self, ids: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """The model's loss, with shapes that do not depend on the data. Padding comes last, and no token sees it."""
        h = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        if not self._last or not self._started:
            return F.cross_entropy(self._scores(h[rows, places]), targets)
        segments = self.core(h, counted=torch.zeros_like(ids, dtype=torch.bool).scatter(1, places, True)).segments

        def pick(name: str) -> Tensor:  # (M, questions, ...)
            return torch.stack([getattr(part, name)[rows, places].flatten(0, 1) for part in segments])

        scores = [self._scores(self.core.read_out(h[rows, places], part.z_h[rows, places])) for part in segments]
        each = torch.stack([F.cross_entropy(part, targets, reduction="none") for part in scores])
        loss = token_mean(each, pick("active")).mean()
        if not self.full.act:
            return loss
        right = torch.stack([part.argmax(-1) == targets for part in scores])
        return loss + self.full.q_loss_weight * q_loss(pick("q"), right, pick("active"), pick("last")).mean()

    def _scores(self, hidden: Tensor) -> Tensor:
        """(B, q, d) -> (B * q, vocabulary) float32."""
        return self.model._logits(hidden).float().flatten(0, 1)

    def judge(
        self, rows: Sequence[Asked], depths: Sequence[int], pad: int
    ) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
        """Share of right answers by depth, and seconds: as trained, and with each N, T, segments of `_other_depths`."""
        config, found, seconds = self.core.config, {}, {}
        predict(self.model, rows[: self.options.judge_batch], pad, batch_size=self.options.judge_batch)  # warm
        for how in ("trained", *self._other_depths()):
            self._as_trained()
            segments = None
            if how != "trained":
                config.h_cycles, config.l_steps, segments = how
                config.grad_cycles = config.grad_l_steps = 1
            name = "trained" if how == "trained" else "N{} T{} M{}".format(*how)
            began = self._now()
            with self._without_core() if self.arm.core is None else nullcontext():
                right = predict(self.model, rows, pad, batch_size=self.options.judge_batch, segments=segments)
            found[name], seconds[name] = by_depth(right, depths), round(self._now() - began, 3)
        return found, seconds

    def segments_used(self, rows: Sequence[Asked], depths: Sequence[int], pad: int) -> dict[int, float]:
        """Segments a token where halting decides, by the depth of the problem."""
        used = {}
        self._as_trained()
        for depth in sorted(set(depths)):
            own = [row for row, of in zip(rows, depths, strict=True) if of == depth]
            with Depth(self.model) as counted:
                predict(self.model, own, pad, batch_size=self.options.judge_batch)
            used[depth] = counted.mean
        return used

    def _as_trained(self) -> None:
        for name, value in self.full.to_dict().items():
            setattr(self.core.config, name, value)

    def _other_depths(self) -> list[tuple[int, int, int]]:
        """N, T and segments to judge a core with depth at: less and more of each than it was trained with."""
        n, t = self.full.h_cycles, self.full.l_steps
        if self.arm.cut:
            most = self.options.segments
            return [(n, t, count) for count in (*range(1, most + 1), 2 * most)]
        if self.arm.core is None or n == 1:
            return []
        cycles = sorted({1, n // 2, n + 1, 2 * n})
        deeper = [*((cycle, t, 1) for cycle in cycles), (n, 2 * t, 1)]
        return [*deeper, (n, t, 2), (n, t, 4)] if self._last else deeper

    @contextmanager
    def _without_core(self) -> Iterator[None]:
        """The core's read-out is still zero, so that the model is its backbone; only its time is saved."""
        core, self.core.config.h_cycles, self.core.config.l_steps = self.full, 1, 1
        yield
        self.core.config.h_cycles, self.core.config.l_steps = core.h_cycles, core.l_steps

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


def make_rows(options: argparse.Namespace, tokenizer: Any) -> tuple[list[Asked], list[Asked], list[int]]:
    """Texts to train on, each with `options.questions` questions, problems to judge by, and their depths.

    No problem to judge by is about a text that is trained on.
    """
    trained = {"objects": options.objects, "max_depth": options.max_depth, "questions": options.questions}
    judged: dict[str, Example] = {}
    for depth in options.judge_depths:
        found: list[Example] = []
        own = {**trained, "min_depth": depth, "max_depth": depth, "questions": 1}
        for text, asked in texts(options.task, own, 10**6 + depth):
            if text not in judged:
                found.append(Example(text + asked[0][0], asked[0][1], "made", {"depth": depth}))
                judged[text] = found[-1]
            if len(found) == options.judged:
                break
    made = (row for row in texts(options.task, trained, 0) if row.text not in judged)
    train = [
        Example(text + asked[0][0], asked[0][1], "made", {}, tuple(turn[:2] for turn in asked[1:]))
        for text, asked in islice(made, options.rows)
    ]
    held_out, template = list(judged.values()), Template("{prompt} {answer}")
    encoded = (encode(examples, template, tokenizer, 512) for examples in (train, held_out))
    rows, others = ([Asked.of(row) for row in part] for part in encoded)
    return rows, others, [example.entry["depth"] for example in held_out]


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
    parser.add_argument("--questions", type=int, default=1, help="about each text that is trained on")
    parser.add_argument("--max-depth", type=int, default=10)
    parser.add_argument("--judge-depths", nargs="+", type=int, default=[2, 4, 6, 8, 10, 12, 14, 16])
    parser.add_argument("--judged", type=int, default=250, help="problems of each depth")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--judge-batch", type=int, default=512)
    parser.add_argument("--core", default="{}", help="fields of the core as JSON, in place of the default ones")
    parser.add_argument("--segments", type=int, default=2, help="into which two arms cut the N cycles")
    parser.add_argument("--core-lr", type=float, default=2e-4)
    parser.add_argument("--adapter-lr", type=float, default=5e-4)
    parser.add_argument("--layers", type=int, help="of the backbone, the first ones; default: all")
    parser.add_argument("--at", type=int, metavar="LAYER", help="the core behind this layer; default: behind the last")
    parser.add_argument(
        "--core-from",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the training, before which the adapters are alone; the core's rate rises from there",
    )
    parser.add_argument("--hand-over", action="store_true", help="the adapters stop where the core starts")
    parser.add_argument("--frozen", action="store_true", help="no adapters: the core alone is trained")
    parser.add_argument("--whiten", action="store_true", help="what the core reads: directions of equal power")
    parser.add_argument("--output", type=Path, default=Path("depth.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--merge", nargs="+", type=Path, help="files of arms or seeds that ran side by side")
    options, console = parser.parse_args(), Console()
    if options.frozen and "lora" in options.arms and not options.plot:
        parser.error("--arms has lora; without adapters (--frozen) it should not")
    if {"grad_cycles", "grad_l_steps"} & json.loads(options.core).keys():
        parser.error(f"--core is {options.core}; how far the gradient reaches should be left to the arms")
    if not 0 <= options.core_from < 1:
        parser.error(f"--core-from is {options.core_from}; it should be from 0 to below 1")
    if options.hand_over and not options.core_from:
        parser.error("--hand-over goes with --core-from: before it the adapters are trained")
    if options.at is not None and (options.core_from or options.whiten or any(ARMS[name].cut for name in options.arms)):
        parser.error("--at goes with arms of one segment alone, and without --whiten and --core-from")
    cycles = {**CORE, **json.loads(options.core)}["h_cycles"]
    if any(ARMS[name].cut for name in options.arms) and (options.segments < 1 or cycles % options.segments):
        parser.error(f"--segments is {options.segments}; it should divide the core's h_cycles = {cycles}")
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
            trained = run.train(Batches(rows, options.batch_size, tokenizer.pad_token_id, seed, run.device))
            found, took = run.judge(judged, depths, tokenizer.pad_token_id)
            if run.full.act:
                trained["segments_used"] = run.segments_used(judged, depths, tokenizer.pad_token_id)
            results["runs"].append({"arm": name, "seed": seed, **trained, "judged": found, "judge_seconds": took})
            options.output.write_text(json.dumps(results, indent=1))
            results = json.loads(options.output.read_text())  # depths as text, as the file has them
            about_it = f"{trained['steps']} steps, loss {trained['losses'][-1]:.3f}"
            console.print(f"{name} seed {seed}: {about_it}, right by depth {found['trained']}", highlight=False)
    show(results, console)


if __name__ == "__main__":
    main()
