"""What the core learns by itself: chains of look-ups, without a backbone. `python benchmarks/chase.py`

A row holds the arrows of a ring of objects in any order and then a question, "k steps from here?": one token each, with
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
    """Arrows and a question (B, n + 1, HIDDEN), and the answers (B,)."""

    x: Tensor
    answers: Tensor


class Ring:
    """Questions about rings of `objects`."""

    def __init__(self, objects: int) -> None:
        draw = torch.Generator().manual_seed(99)
        self.objects = objects
        self.from_here, self.to, self.start, self.steps = torch.randn(4, objects, HIDDEN, generator=draw)
        self.head = torch.randn(objects, HIDDEN, generator=draw)

    def draw(self, rows: int, draw: torch.Generator, k: int | None = None) -> Rows:
        """Rows with `k` steps, or with 1 to objects - 1 of them."""
        every, n = torch.arange(rows), self.objects
        order, shuffle = (torch.rand(rows, n, generator=draw).argsort(1) for _ in range(2))
        steps = torch.randint(1, n, (rows,), generator=draw) if k is None else torch.full((rows,), k)
        start = torch.randint(n, (rows,), generator=draw)
        one, next_one = (ring.gather(1, shuffle) for ring in (order, order.roll(-1, 1)))
        question = self.start[order[every, start]] + self.steps[steps]
        x = torch.cat([self.from_here[one] + self.to[next_one], question[:, None]], 1)
        return Rows(x, order[every, (start + steps) % n])

    def scores(self, core: HRMCore, x: Tensor) -> Tensor:
        """Logits (B, objects) at the question."""
        return core(x).segments[-1].z_h[:, -1] @ core.w_out @ self.head.T


def make_core(options: argparse.Namespace) -> HRMCore:
    """A core of the settings; gradients through all cycles and steps where nothing else is said."""
    torch.manual_seed(options.seed)
    config = HRMConfig(
        hidden_size=HIDDEN, d_l=options.width, d_h=options.width, head_size=32, attn_heads=4, attn_kv_heads=4,
        h_cycles=options.cycles, l_steps=options.l_steps, fused=False,
        grad_cycles=options.grad_cycles or options.cycles, grad_l_steps=options.grad_l_steps or options.l_steps,
    )  # fmt: skip
    return HRMCore(config)


def train(options: argparse.Namespace) -> dict[str, object]:
    """Trains one core; its losses at four points, and the share of right answers for each k."""
    ring, core, losses = Ring(options.objects), make_core(options), []
    optimizer = torch.optim.AdamW(core.parameters(), lr=options.lr, betas=BETAS, weight_decay=0.0)
    draw, began = torch.Generator().manual_seed(options.seed), time.process_time()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * lr_factor(step, options.steps, 0.05)
        rows = ring.draw(64, draw)
        loss = F.cross_entropy(ring.scores(core, rows.x), rows.answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds, quarter = time.process_time() - began, options.steps // 4
    curve = [statistics.fmean(losses[end - quarter // 2 : end]) for end in range(quarter, options.steps + 1, quarter)]
    return {"losses": [round(loss, 3) for loss in curve], "right": judge(core.eval(), ring), "cpu_seconds": seconds}


@torch.no_grad()
def judge(core: HRMCore, ring: Ring) -> dict[int, float]:
    """Share of right answers to 1,000 questions for each k."""
    found = {}
    for k in range(1, ring.objects):
        rows = ring.draw(1000, torch.Generator().manual_seed(k), k)
        found[k] = (ring.scores(core, rows.x).argmax(-1) == rows.answers).double().mean().item()
    return found


def reach(options: argparse.Namespace) -> dict[str, float]:
    """Norm of the gradient of an untrained core's answers with respect to the question and to the arrows."""
    ring, core = Ring(options.objects), make_core(options)
    torch.nn.init.normal_(core.w_out, std=options.width**-0.5)  # which starts at zero, and would let nothing through
    rows = ring.draw(64, torch.Generator().manual_seed(options.seed))
    x = rows.x.requires_grad_()
    F.cross_entropy(ring.scores(core, x), rows.answers, reduction="sum").backward()
    assert x.grad is not None
    return {"question": x.grad[:, -1].norm().item(), "arrows": x.grad[:, :-1].norm().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reach", action="store_true", help="gradients of an untrained core in place of a training")
    parser.add_argument("--objects", type=int, default=6)
    parser.add_argument("--cycles", type=int, default=6, help="N")
    parser.add_argument("--l-steps", type=int, default=1, help="T")
    parser.add_argument("--grad-cycles", type=int, help="cycles with a gradient; default: all")
    parser.add_argument("--grad-l-steps", type=int, help="L steps of each with a gradient; default: all")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({**vars(options), **(reach(options) if options.reach else train(options))}), flush=True)


if __name__ == "__main__":
    main()
