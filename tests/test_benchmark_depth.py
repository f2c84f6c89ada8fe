"""The depth benchmark: its rows, and that what it trains on is the model's own loss."""

import argparse
import json
from itertools import islice

import depth
import pytest
import torch
from tiny_backbone import save_tiny_backbone

from hrm.loss import IGNORED

CORE = json.dumps({"d_l": 32, "d_h": 32, "head_size": 16, "attn_heads": 2, "h_cycles": 4, "l_steps": 2})


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("tiny"), letters=True)
    return argparse.Namespace(
        backbone=str(backbone), task="pointer_chase", objects=7, max_depth=3, judge_depths=[1, 5], judged=6, rows=20,
        questions=4, batch_size=8, judge_batch=8, core=CORE, core_lr=3e-3, adapter_lr=3e-3, layers=None, frozen=False,
        whiten=False, at=None, core_from=0.0, hand_over=False, segments=2, steps=6, seconds=0.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(options: argparse.Namespace) -> tuple:
    tokenizer = depth.load_tokenizer(options.backbone)
    return depth.make_rows(options, tokenizer), tokenizer


def test_rows_are_texts_with_questions_and_answers_stand_beside_them(made: tuple) -> None:
    (rows, held_out, depths), tokenizer = made
    batches = depth.Batches(rows, 8, tokenizer.pad_token_id, 0, torch.device("cpu"))
    assert len(rows) == 20 and depths == [1] * 6 + [5] * 6
    for ids, places, targets in zip(batches.ids, batches.places, batches.targets, strict=True):
        assert_answered(tokenizer, ids, places, targets, 4)
    for row, steps in zip(held_out, depths, strict=True):
        ids = torch.tensor(row.tokens)
        assert row.labels[:-1] == [IGNORED] * (len(ids) - 1)  # the answer is learnt where the question ends
        assert_answered(tokenizer, ids, torch.tensor([len(ids) - 2]), torch.tensor(row.labels[-1:]), 1)
        assert int(tokenizer.decode(ids).split()[-4]) == steps
    assert not {table(tokenizer, row) for row in rows} & {table(tokenizer, row) for row in held_out}


def table(tokenizer: object, row: object) -> str:
    return tokenizer.decode(row.tokens).rpartition(",")[0]


def assert_answered(tokenizer: object, ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, count: int):
    text, _, last = tokenizer.decode(ids[ids != tokenizer.pad_token_id]).rpartition("?")
    assert last.strip() == tokenizer.decode(targets[-1]).strip()  # which nothing scored can see
    arrows, _, asked = f"{text}?".rpartition(",")
    follows, questions = dict(pair.split() for pair in arrows.split(", ")), asked.removesuffix("?").split("?")
    assert len(questions) == len(set(questions)) == count
    for question, place, target in zip(questions, places, targets, strict=True):
        assert tokenizer.decode(ids[: place + 1]).endswith(question + "?")
        steps, _, at = question.split()
        for _ in range(int(steps)):
            at = follows[at]
        assert tokenizer.decode(target).strip() == at


def test_every_row_comes_once_before_any_comes_again(made: tuple) -> None:
    (rows, _, _), tokenizer = made
    batches = depth.Batches(rows, 5, tokenizer.pad_token_id, 0, torch.device("cpu"))
    chosen = torch.cat(list(islice(batches, 8)))
    assert sorted(chosen[:20].tolist()) == sorted(chosen[20:].tolist()) == list(range(20))


@pytest.mark.parametrize("name", ["lora", "control", "full", "segments", "act"])
def test_the_loss_is_the_models_own(options: argparse.Namespace, made: tuple, name: str) -> None:
    (rows, _, _), tokenizer = made
    run, batches = depth.Run(options, name, 0), depth.Batches(rows, 8, tokenizer.pad_token_id, 0, torch.device("cpu"))
    if run.arm.core is not None:
        torch.nn.init.normal_(run.model.hrm.w_out, std=0.1)  # zero at first, where the core would not matter
        torch.nn.init.normal_(run.model.hrm.w_q, std=0.1)
        run.model.hrm.b_q.data[0] += 0.2  # some halt, some go on
    run._started, chosen = True, torch.arange(8)
    torch.manual_seed(1)  # who explores
    loss = run._backward(batches, chosen)
    mask = (batches.ids != tokenizer.pad_token_id).long()
    torch.manual_seed(1)
    with torch.no_grad():
        expected = run.model(batches.ids[chosen], mask[chosen], labels=batches.labels[chosen]).loss
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", list(depth.ARMS))
def test_an_arm_trains_and_is_judged(options: argparse.Namespace, made: tuple, name: str) -> None:
    (rows, held_out, depths), tokenizer = made
    run = depth.Run(options, name, 0)
    trained = run.train(depth.Batches(rows, 8, tokenizer.pad_token_id, 0, torch.device("cpu")))
    assert trained["steps"] == len(trained["losses"]) == 6
    assert trained["losses"][-1] < trained["losses"][0] or name == "act"  # its Q head rises
    found, seconds = run.judge(held_out, depths, tokenizer.pad_token_id)
    assert found.keys() == seconds.keys()
    assert all(set(shares) == {1, 5} for shares in found.values())
    assert len(found) == {"lora": 1, "control": 1, "segments": 4, "act": 4}.get(name, 8)
    if name == "act":
        assert all(1 <= used <= 2 for used in run.segments_used(held_out, depths, tokenizer.pad_token_id).values())
    moved = run.model.hrm.w_out.abs().sum().item()
    assert (moved == 0) == (name == "lora")  # the adapters alone


def test_a_core_inside_is_trained_and_the_layers_after_it_read_what_it_gives(
    options: argparse.Namespace, made: tuple
) -> None:
    (rows, held_out, depths), tokenizer = made
    run = depth.Run(argparse.Namespace(**{**vars(options), "at": 1}), "full", 0)
    ids = torch.tensor([rows[0].tokens])
    plain = run.model(ids).logits
    torch.nn.init.normal_(run.core.w_out, std=0.1)
    assert (run.model(ids).logits - plain).abs().max() > 1e-3
    torch.nn.init.zeros_(run.core.w_out)
    assert torch.equal(run.model(ids).logits, plain)
    trained = run.train(depth.Batches(rows, 8, tokenizer.pad_token_id, 0, torch.device("cpu")))
    assert trained["losses"][-1] < trained["losses"][0]
    assert run.core.w_out.abs().sum() > 0 and run.model.hrm.w_out.abs().sum() == 0
    found, _ = run.judge(held_out, depths, tokenizer.pad_token_id)
    assert found.keys() == {"trained", "N1 T2 M1", "N2 T2 M1", "N5 T2 M1", "N8 T2 M1", "N4 T4 M1"}


def test_a_core_inside_is_trained_by_code_compiled_after_a_backbone_without_one(
    options: argparse.Namespace, made: tuple
) -> None:
    (rows, _, _), tokenizer = made
    for name in ("lora", "full"):
        run = depth.Run(argparse.Namespace(**{**vars(options), "at": 1, "steps": 2}), name, 0)
        run._compiled = torch.compile(run.model.get_decoder().forward, dynamic=False, backend="eager")
        run.train(depth.Batches(rows, 8, tokenizer.pad_token_id, 0, torch.device("cpu")))
    assert run.core.w_out.abs().sum() > 0


def test_a_core_put_on_later_leaves_the_adapters_alone_before(options: argparse.Namespace, made: tuple) -> None:
    (rows, _, _), tokenizer = made
    losses = {}
    for name, share in (("lora", 0.0), ("segments", 0.5)):
        own = argparse.Namespace(**{**vars(options), "core_from": share, "whiten": True, "steps": 8})
        run = depth.Run(own, name, 0)
        batches = depth.Batches(rows, 8, tokenizer.pad_token_id, 0, torch.device("cpu"))
        losses[name] = run.train(batches)["losses"]
    assert losses["lora"][:5] == losses["segments"][:5]  # the read-out starts at zero
    assert losses["lora"][6:] != losses["segments"][6:]
    assert len(run.core._forward_pre_hooks) == 1


def test_adapters_that_hand_over_stay_as_they_are(options: argparse.Namespace, made: tuple) -> None:
    (rows, _, _), tokenizer = made
    own = argparse.Namespace(**{**vars(options), "core_from": 0.5, "hand_over": True, "steps": 4})
    run, before = depth.Run(own, "full", 0), {}

    def start() -> None:
        freeze()
        before.update({name: value.clone() for name, value in run.model.named_parameters()})

    freeze, run._freeze_adapters = run._freeze_adapters, start
    run.train(depth.Batches(rows, 8, tokenizer.pad_token_id, 0, torch.device("cpu")))
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("hrm.") for name in moved)
    assert any(before[name].abs().sum() > 0 for name in before if "lora_B" in name)  # they did train before


def test_whitening_gives_every_direction_that_matters_the_same_power() -> None:
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(4000, 8, generator=draw) * torch.tensor([5.0, 3, 2, 1, 1, 0.5, 0.3, 0.2]) + 2
    white = depth.Whitening(h)(h)
    torch.testing.assert_close(white.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    power = torch.linalg.eigvalsh(torch.cov(white.T))
    assert power[0] > 0.8 and power[-1] < 1.1


def test_a_whitened_core_is_judged_as_it_was_trained(options: argparse.Namespace, made: tuple) -> None:
    (rows, held_out, depths), tokenizer = made
    plain, whitened = ({**vars(options), "whiten": on, "frozen": True} for on in (False, True))
    losses = []
    for own in (plain, whitened):
        run = depth.Run(argparse.Namespace(**own), "full", 0)
        losses.append(run.train(depth.Batches(rows, 8, tokenizer.pad_token_id, 0, torch.device("cpu")))["losses"])
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]  # the read-out starts at zero
    assert len(run.model.hrm._forward_pre_hooks) == 1
    run.judge(held_out, depths, tokenizer.pad_token_id)
