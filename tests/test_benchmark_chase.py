"""The chase benchmark: its rows, segments with a loss each, and halting."""

import argparse

import chase
import pytest
import torch

CPU = torch.device("cpu")


def options(**own: object) -> argparse.Namespace:
    given = {
        "objects": 5, "most": 2, "questions": 6, "rows": 8, "cycles": 2, "l_steps": 1, "segments": 1, "act": False,
        "grad_cycles": None, "grad_l_steps": None, "width": 64, "hidden": 32, "biases": None, "lr": 2e-3, "steps": 40,
        "seed": 0,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **own})


def test_answers_are_where_the_arrows_lead() -> None:
    ring = chase.Ring(5, 32, CPU)
    x, answers = ring.draw(3, 6, torch.Generator().manual_seed(0), range(1, 3))
    for row, found in zip(x, answers, strict=True):
        arrows = {}
        for token in row[:5]:
            both = ((token - ring.from_here[:, None] - ring.to[None]) ** 2).sum(-1)
            start, end = divmod(int(both.argmin()), 5)
            arrows[start] = end
        for token, answer in zip(row[5:], found, strict=True):
            start, steps = divmod(int(((token - ring.start[:, None] - ring.steps[None]) ** 2).sum(-1).argmin()), 5)
            for _ in range(steps):
                start = arrows[start]
            assert start == answer


@pytest.mark.parametrize("own", [{}, {"segments": 2}, {"segments": 2, "act": True}])
def test_a_core_learns(own: dict) -> None:
    settings = options(**own)
    found = chase.train(settings)
    assert found["losses"][-1] < found["losses"][0]
    for k in (1, 2):
        counts = found["right"][k] if "segments" in own else [found["right"][k]]
        assert len(counts) == (4 if "segments" in own else 1) and all(0 <= right <= 1 for right in counts)
        if settings.act:
            assert 1 <= found["halting"][k]["segments"] <= 2


def test_the_loss_is_the_mean_of_the_segments_own() -> None:
    torch.manual_seed(0)
    core, ring = chase.make_core(options(segments=3), CPU), chase.Ring(5, 32, CPU)
    torch.nn.init.normal_(core.w_out, std=0.1)
    rows = ring.draw(4, 6, torch.Generator().manual_seed(0), range(1, 3))
    total = chase.losses_of(core, ring, rows).total
    z_h = [part.z_h[:, 5:] for part in core(rows.x).segments]
    each = [torch.nn.functional.cross_entropy(ring.scores(core, z).flatten(0, 1), rows.answers.flatten()) for z in z_h]
    assert len(each) == 3
    torch.testing.assert_close(total, torch.stack(each).mean())


def test_deciding_one_by_one_answers_as_a_whole_pass_does() -> None:
    settings = options(segments=2, act=True, steps=30)
    core, ring = chase.make_core(settings, CPU), chase.Ring(5, 32, CPU)
    torch.nn.init.normal_(core.w_out, std=0.1)
    rows = ring.draw(20, 6, torch.Generator().manual_seed(0), range(1, 3))
    with torch.no_grad():
        z_h = core.eval()(rows.x, segments=2).z_h[:, 5:]
        whole = chase.share(ring.scores(core, z_h), rows)
        assert chase.decide(core, ring, rows, 2)["right"] == whole
