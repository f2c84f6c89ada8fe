"""What the core learns by itself: chains of look-ups, without a backbone. `python benchmarks/chase.py`

A row holds the arrows of a ring of objects in any order and then questions, "k steps from here?": one token each, with
fixed random embeddings. Only the H steps mix tokens, so each look-up takes an H step: the cheapest task on which depth
must pay. On a ring of n objects k steps are n - k steps back, so that the middle k are the deepest; chance is one
in n. Every step draws new rows. On one CPU thread in float32; on a GPU in bfloat16, each step recorded in a CUDA graph.

    python benchmarks/chase.py --cycles 6 --lr 2e-4         trains; prints the loss and the share of right answers by k
    python benchmarks/chase.py --cycles 2 --segments 3      a loss after each of three segments; right answers after
                                                            1, 2, ... twice as many segments
    python benchmarks/chase.py --cycles 2 --segments 3 --act  the same with halting: segments used by k, and what
                                                            deciding the questions one by one takes, as in decoding
    python benchmarks/chase.py --cycles 4 --reach           an untrained core: how far the gradient of an answer reaches
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from recording import record
from torch import Tensor

from hrm import HRMConfig, HRMCore
from hrm.attention import SlotCache
from hrm.core import CoreOutput
from hrm.loss import q_loss, token_mean
from hrm.trainer import BETAS, lr_factor


class Rows(NamedTuple):
    """Arrows and questions (B, n + q, hidden), and the answers (B, q)."""

    x: Tensor
    answers: Tensor


class Ring:
    """Questions about rings of `objects`."""

    def __init__(self, objects: int, hidden: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(99)
        self.objects = objects
        embeddings = torch.randn(4, objects, hidden, generator=draw), torch.randn(objects, hidden, generator=draw)
        (self.from_here, self.to, self.start, self.steps), self.head = (part.to(device) for part in embeddings)
        self.head *= 64 / hidden  # one step of the read-out moves the logits alike at all widths

    def draw(self, rows: int, questions: int, draw: torch.Generator, steps: range) -> Rows:
        """Rows, each with `questions` questions of as many steps as `steps` holds, evenly."""
        n, device = self.objects, draw.device
        order, shuffle = (torch.rand(rows, n, generator=draw, device=device).argsort(1) for _ in range(2))
        count = torch.randint(steps.start, steps.stop, (rows, questions), generator=draw, device=device)
        start = torch.randint(n, (rows, questions), generator=draw, device=device)
        one, next_one = (ring.gather(1, shuffle) for ring in (order, order.roll(-1, 1)))
        asked = self.start[order.gather(1, start)] + self.steps[count]
        x = torch.cat([self.from_here[one] + self.to[next_one], asked], 1)
        return Rows(x, order.gather(1, (start + count) % n))

    def scores(self, core: HRMCore, z_h: Tensor) -> Tensor:
        """z_H (..., d_h) -> logits (..., objects), float32."""
        return (z_h @ core.w_out @ self.head.T.to(z_h.dtype)).float()


def make_core(options: argparse.Namespace, device: torch.device) -> HRMCore:
    """A core of the settings; gradients through all cycles and steps where nothing else is said."""
    torch.manual_seed(options.seed)
    few = {"head_size": 32, "attn_heads": 4, "attn_kv_heads": 4} if options.hidden < 512 else {}
    config = HRMConfig(
        hidden_size=options.hidden, d_l=options.width, d_h=options.width, h_cycles=options.cycles,
        l_steps=options.l_steps, grad_cycles=options.grad_cycles or options.cycles,
        grad_l_steps=options.grad_l_steps or options.l_steps, segments=1 if options.act else options.segments,
        max_segments=options.segments, act=options.act, exploration=0.3 if options.act else 0.0, **few,
    )  # fmt: skip
    core = HRMCore(config)
    if options.biases is not None:
        with torch.no_grad():
            gates = core.b_c[: config.d_l], core.b_h[: config.d_h], core.b_h[2 * config.d_h :]
            for gate, bias in zip(gates, options.biases, strict=True):
                gate.fill_(bias)
    return core.to(device)


class Losses(NamedTuple):
    """One step's: what is trained on (), and the last segment's cross entropy ()."""

    total: Tensor
    last: Tensor


def losses_of(core: HRMCore, ring: Ring, rows: Rows) -> Losses:
    """A mean over the questions: of the cross entropy of the segments that each ran, and the Q head's loss."""
    asked = torch.zeros(rows.x.shape[:2], dtype=torch.bool, device=rows.x.device)
    asked[:, ring.objects :] = True
    with torch.autocast(rows.x.device.type, torch.bfloat16, enabled=rows.x.is_cuda):
        out = core(rows.x, counted=asked, look_ahead=core.config.act)
        scores = [ring.scores(core, part.z_h[:, ring.objects :]).flatten(0, 1) for part in out.segments]
    answers = rows.answers.flatten()
    each = torch.stack([F.cross_entropy(part, answers, reduction="none") for part in scores])
    ran = torch.stack([part.active[:, ring.objects :].flatten() for part in out.segments])
    total = token_mean(each, ran).mean()
    if core.config.act:
        right = torch.stack([part.argmax(-1) == answers for part in scores])
        total = total + core.config.q_loss_weight * halting_loss(out, right, ring.objects)
    return Losses(total, each[-1].mean().detach())


def halting_loss(out: CoreOutput, right: Tensor, objects: int) -> Tensor:
    """The Q head's loss, a mean over the questions."""
    shown = [*out.segments, *([] if out.ahead is None else [out.ahead])]
    values, active, last = (
        torch.stack([getattr(part, name)[:, objects:].flatten(0, 1) for part in shown])
        for name in ("q", "active", "last")
    )
    return q_loss(values, right, active, last).mean()


def train(options: argparse.Namespace) -> dict[str, object]:
    """Trains one core; its losses at four points, and the share of right answers for each k."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ring, core, losses = Ring(options.objects, options.hidden, device), make_core(options, device), []
    draw = torch.Generator(device).manual_seed(options.seed)
    step_of = make_step(core, ring, options)
    began = time.perf_counter()
    for step in range(options.steps):
        rows = ring.draw(options.rows, options.questions, draw, range(1, options.most + 1))
        losses.append(step_of(rows, options.lr * lr_factor(step, options.steps, 0.05)))
    ends = range(options.steps // 4, options.steps + 1, options.steps // 4)
    curve = [statistics.fmean(loss.item() for loss in losses[end - options.steps // 8 : end]) for end in ends]
    seconds = time.perf_counter() - began
    found = {"losses": [round(loss, 3) for loss in curve], **judge(core.eval(), ring, options)}
    return {**found, "seconds": round(seconds), "device": torch.cuda.get_device_name() if core.w_x.is_cuda else "cpu"}


def make_step(core: HRMCore, ring: Ring, options: argparse.Namespace) -> Callable[[Rows, float], Tensor]:
    """A function that trains on rows at a learning rate and returns the last segment's loss."""
    graph = core.w_x.is_cuda
    rate = torch.tensor(options.lr, device=core.w_x.device) if graph else options.lr
    optimizer = torch.optim.AdamW(core.parameters(), lr=rate, betas=BETAS, weight_decay=0.0, capturable=graph)

    def work(rows: Rows) -> Tensor:
        optimizer.zero_grad()
        losses = losses_of(core, ring, rows)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        return losses.last

    if graph:
        return recorded(work, core, ring, optimizer, options)

    def step(rows: Rows, lr: float) -> Tensor:
        optimizer.param_groups[0]["lr"] = lr
        return work(rows)

    return step


def recorded(
    work: Callable[[Rows], Tensor], core: HRMCore, ring: Ring, optimizer: Any, options: argparse.Namespace
) -> Callable[[Rows, float], Tensor]:
    """`work` as a CUDA graph; what the runs that it needs before did to core and optimizer is undone."""
    draw = torch.Generator(core.w_x.device).manual_seed(0)
    held = ring.draw(options.rows, options.questions, draw, range(1, options.most + 1))
    before = {name: value.clone() for name, value in core.state_dict().items()}
    graph, loss = record(lambda: work(held))
    core.load_state_dict(before)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()

    def step(rows: Rows, lr: float) -> Tensor:
        for into, of in zip(held, rows, strict=True):
            into.copy_(of)
        optimizer.param_groups[0]["lr"].fill_(lr)
        graph.replay()
        return loss.clone()

    return step


@torch.no_grad()
def judge(core: HRMCore, ring: Ring, options: argparse.Namespace) -> dict[str, Any]:
    """By k, of about 1,000 questions: the share of right answers after 1, 2, ... segments, as trained where there is
    one; under ACT also where halting decides, the segments it uses, and the seconds that both ways take."""
    right: dict[int, Any] = {}
    halting: dict[int, dict[str, float]] = {}
    for k in range(1, options.most + 1):
        draw = torch.Generator(core.w_x.device).manual_seed(k)
        rows = ring.draw(1000 // options.questions, options.questions, draw, range(k, k + 1))
        with torch.autocast(rows.x.device.type, torch.bfloat16, enabled=rows.x.is_cuda):
            out = core(rows.x, segments=1 if options.segments == 1 else 2 * options.segments)
            shares = [share(ring.scores(core, part.z_h[:, ring.objects :]), rows) for part in out.segments]
            right[k] = shares[0] if options.segments == 1 else shares
            if options.act:
                halting[k] = decide(core, ring, rows, None)
                for count in range(1, options.segments + 1):
                    halting[k][f"seconds_{count}"] = decide(core, ring, rows, count)["seconds"]
    return {"right": right, **({"halting": halting} if options.act else {})}


def share(scores: Tensor, rows: Rows) -> float:
    """Of right answers."""
    return round((scores.argmax(-1) == rows.answers).double().mean().item(), 3)


def decide(core: HRMCore, ring: Ring, rows: Rows, segments: int | None) -> dict[str, float]:
    """Answers the questions one token at a time behind the arrows, which run all segments: the share of right ones,
    segments a question, seconds (the best of three times)."""
    best = float("inf")
    for _ in range(3):
        cache, states, used = SlotCache(), [], []
        core(rows.x[:, : ring.objects], segments=core.config.max_segments, cache=cache)
        began = now(core)
        for at in range(ring.objects, rows.x.shape[1]):
            out = core(rows.x[:, at : at + 1], segments=segments, cache=cache)
            states.append(out.z_h)
            used.append(out.segments_used)
        best = min(best, now(core) - began)
    mean = torch.cat(used, 1).double().mean().item()
    return {"right": share(ring.scores(core, torch.cat(states, 1)), rows), "segments": mean, "seconds": best}


def now(core: HRMCore) -> float:
    """Seconds, once the device has done its work."""
    if core.w_x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def reach(options: argparse.Namespace) -> dict[str, float]:
    """Norm of the gradient of an untrained core's answers with respect to the question and to the arrows."""
    device = torch.device("cpu")
    ring, core = Ring(options.objects, options.hidden, device), make_core(options, device)
    torch.nn.init.normal_(core.w_out, std=options.width**-0.5)  # which starts at zero, and would let nothing through
    rows = ring.draw(64, 1, torch.Generator().manual_seed(options.seed), range(1, options.most + 1))
    x = rows.x.requires_grad_()
    scores = ring.scores(core, core(x).segments[-1].z_h[:, ring.objects :])
    F.cross_entropy(scores.flatten(0, 1), rows.answers.flatten(), reduction="sum").backward()
    assert x.grad is not None
    return {"question": x.grad[:, -1].norm().item(), "arrows": x.grad[:, :-1].norm().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reach", action="store_true", help="gradients of an untrained core in place of a training")
    parser.add_argument("--objects", type=int, default=6)
    parser.add_argument("--most", type=int, help="steps of a question; default: all but one way round")
    parser.add_argument("--questions", type=int, default=1, help="in a row")
    parser.add_argument("--rows", type=int, default=64, help="in a training step")
    parser.add_argument("--cycles", type=int, default=6, help="N")
    parser.add_argument("--l-steps", type=int, default=1, help="T")
    parser.add_argument("--segments", type=int, default=1, help="M")
    parser.add_argument("--act", action="store_true", help="halting by the Q head; exploration 0.3")
    parser.add_argument("--grad-cycles", type=int, help="cycles with a gradient; default: all")
    parser.add_argument("--grad-l-steps", type=int, help="L steps of each with a gradient; default: all")
    parser.add_argument("--width", type=int, default=128, help="of both states")
    parser.add_argument("--hidden", type=int, default=64, help="width of the embeddings")
    parser.add_argument("--biases", type=float, nargs=3, help="of the gates g, p, r at the start; default: the core's")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.most = options.most or options.objects - 1
    if not 1 <= options.most < options.objects or not 1 <= options.questions <= 1000:
        parser.error("--most should be from 1 to below --objects, --questions from 1 to 1000")
    torch.set_num_threads(1)
    print(json.dumps({**vars(options), **(reach(options) if options.reach else train(options))}), flush=True)


if __name__ == "__main__":
    main()
