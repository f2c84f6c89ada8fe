"""What the core learns by itself: chains of look-ups, without a backbone. `python benchmarks/chase.py`

A row holds the arrows of a ring of objects in any order and then questions, "k steps from here?": one token each, with
fixed random embeddings. Only the H steps mix tokens, so each look-up takes an H step: the cheapest task on which depth
must pay. On a ring of n objects k steps are n - k steps back, so that the middle k are the deepest; chance is one
in n. Every step draws new rows; float32, one CPU thread.

    python benchmarks/chase.py --cycles 6 --lr 2e-4         trains; prints the loss and the share of right answers by k
    python benchmarks/chase.py --cycles 4 --reach           an untrained core: how far the gradient of an answer reaches
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm import HRMConfig, HRMCore
from hrm.trainer import BETAS, lr_factor

HIDDEN = 64  # width of the embeddings


class Rows(NamedTuple):
    """Arrows and questions (B, n + q, HIDDEN), and the answers (B, q)."""

    x: Tensor
    answers: Tensor


class Ring:
    """Questions about rings of `objects`."""

    def __init__(self, objects: int) -> None:
        draw = torch.Generator().manual_seed(99)
        self.objects = objects
        self.from_here, self.to, self.start, self.steps = torch.randn(4, objects, HIDDEN, generator=draw)
        self.head = torch.randn(objects, HIDDEN, generator=draw)

    def draw(self, rows: int, questions: int, draw: torch.Generator, steps: range) -> Rows:
        """Rows, each with `questions` questions of as many steps as `steps` holds, evenly."""
        n = self.objects
        order, shuffle = (torch.rand(rows, n, generator=draw).argsort(1) for _ in range(2))
        count = torch.randint(steps.start, steps.stop, (rows, questions), generator=draw)
        start = torch.randint(n, (rows, questions), generator=draw)
        one, next_one = (ring.gather(1, shuffle) for ring in (order, order.roll(-1, 1)))
        asked = self.start[order.gather(1, start)] + self.steps[count]
        x = torch.cat([self.from_here[one] + self.to[next_one], asked], 1)
        return Rows(x, order.gather(1, (start + count) % n))

    def scores(self, core: HRMCore, x: Tensor) -> Tensor:
        """Logits (B, q, objects) at the questions."""
        return core(x).segments[-1].z_h[:, self.objects :] @ core.w_out @ self.head.T


def make_core(options: argparse.Namespace) -> HRMCore:
    """A core of the settings; gradients through all cycles and steps where nothing else is said."""
    torch.manual_seed(options.seed)
    config = HRMConfig(
        hidden_size=HIDDEN, d_l=options.width, d_h=options.width, head_size=32, attn_heads=4, attn_kv_heads=4,
        h_cycles=options.cycles, l_steps=options.l_steps, fused=False,
        grad_cycles=options.grad_cycles or options.cycles, grad_l_steps=options.grad_l_steps or options.l_steps,
    )  # fmt: skip
    core = HRMCore(config)
    if options.biases is not None:
        with torch.no_grad():
            gates = core.b_c[: config.d_l], core.b_h[: config.d_h], core.b_h[2 * config.d_h :]
            for gate, bias in zip(gates, options.biases, strict=True):
                gate.fill_(bias)
    return core


def train(options: argparse.Namespace) -> dict[str, object]:
    """Trains one core; its losses at four points, and the share of right answers for each k."""
    ring, core, losses = Ring(options.objects), make_core(options), []
    optimizer = torch.optim.AdamW(core.parameters(), lr=options.lr, betas=BETAS, weight_decay=0.0)
    draw, began = torch.Generator().manual_seed(options.seed), time.process_time()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * lr_factor(step, options.steps, 0.05)
        rows = ring.draw(options.rows, options.questions, draw, range(1, options.most + 1))
        loss = F.cross_entropy(ring.scores(core, rows.x).flatten(0, 1), rows.answers.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds, quarter = time.process_time() - began, options.steps // 4
    curve = [statistics.fmean(losses[end - quarter // 2 : end]) for end in range(quarter, options.steps + 1, quarter)]
    right = judge(core.eval(), ring, options)
    return {"losses": [round(loss, 3) for loss in curve], "right": right, "cpu_seconds": round(seconds)}


@torch.no_grad()
def judge(core: HRMCore, ring: Ring, options: argparse.Namespace) -> dict[int, float]:
    """Share of right answers to about 1,000 questions for each k."""
    found = {}
    for k in range(1, options.most + 1):
        draw = torch.Generator().manual_seed(k)
        rows = ring.draw(1000 // options.questions, options.questions, draw, range(k, k + 1))
        found[k] = round((ring.scores(core, rows.x).argmax(-1) == rows.answers).double().mean().item(), 3)
    return found


def reach(options: argparse.Namespace) -> dict[str, float]:
    """Norm of the gradient of an untrained core's answers with respect to the question and to the arrows."""
    ring, core = Ring(options.objects), make_core(options)
    torch.nn.init.normal_(core.w_out, std=options.width**-0.5)  # which starts at zero, and would let nothing through
    rows = ring.draw(64, 1, torch.Generator().manual_seed(options.seed), range(1, options.most + 1))
    x = rows.x.requires_grad_()
    F.cross_entropy(ring.scores(core, x).flatten(0, 1), rows.answers.flatten(), reduction="sum").backward()
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
    parser.add_argument("--grad-cycles", type=int, help="cycles with a gradient; default: all")
    parser.add_argument("--grad-l-steps", type=int, help="L steps of each with a gradient; default: all")
    parser.add_argument("--width", type=int, default=128)
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
