"""The same documents, batched in any way, give the same losses, gradients, depths and logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import ACT, VOCABULARY
from torch import Tensor

from hrm import HRMGemmaForCausalLM
from hrm.batching import BatchPlan, widest_part
from hrm.loss import IGNORED

Make = Callable[..., HRMGemmaForCausalLM]
LENGTHS = 5, 12, 1, 9


@pytest.fixture
def documents() -> list[Tensor]:
    """Token ids of four documents of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def alone(document: Tensor) -> dict[str, Tensor]:
    return {"input_ids": document[None], "labels": document[None]}


def padded(documents: list[Tensor], side: str) -> dict[str, Tensor]:
    width = max(map(len, documents))
    ids = torch.full((len(documents), width), 7)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        place = slice(width - len(document), None) if side == "left" else slice(len(document))
        ids[row, place], mask[row, place] = document, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def packed(documents: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def gradients(model: HRMGemmaForCausalLM, batches: list[dict[str, Tensor]], items: int) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        out = model(**batch, num_items_in_batch=items)
        out.loss.backward()
        total = total + out.loss.detach()
    return total, [
        p.grad.clone() for group in model.trainable_parameters().values() for p in group if p.grad is not None
    ]


@pytest.mark.parametrize("settings", [{"segments": 2}, ACT], ids=["segments", "act"])
@pytest.mark.parametrize("way", ["right", "left", "packed", "pairs"])
def test_equal_losses_and_gradients(
    make_model: Make, kind: str, documents: list[Tensor], way: str, settings: Any
) -> None:
    model = make_model(kind, **settings).train()
    items = sum(length - 1 for length in LENGTHS)
    batches = {
        "right": lambda: [padded(documents, "right")],
        "left": lambda: [padded(documents, "left")],
        "packed": lambda: [packed(documents)],
        "pairs": lambda: [packed(documents[:2]), padded(documents[2:], "right")],
    }[way]()
    loss, expected = gradients(model, [alone(document) for document in documents], items)
    found, grads = gradients(model, batches, items)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for grad, wanted in zip(grads, expected, strict=True):
        assert (grad - wanted).norm() <= 1e-4 * wanted.norm()


def test_packed_documents_do_not_see_each_other(make_model: Make, kind: str, documents: list[Tensor]) -> None:
    model = make_model(kind, segments=2)
    batch = packed(documents)
    other = batch["input_ids"].clone()
    other[:, LENGTHS[0] : LENGTHS[0] + LENGTHS[1]] = other[:, LENGTHS[0] : LENGTHS[0] + LENGTHS[1]].flip(1)
    with torch.no_grad():
        logits, changed = (model(ids, position_ids=batch["position_ids"]).logits for ids in (batch["input_ids"], other))
    same = torch.ones(sum(LENGTHS), dtype=torch.bool)
    same[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]] = False
    torch.testing.assert_close(logits[:, same], changed[:, same])
    assert not torch.allclose(logits[:, ~same], changed[:, ~same])


def test_packed_rows_may_be_longer_than_any_document_may(make_model: Make, documents: list[Tensor]) -> None:
    model, batch = make_model(), packed(documents * 4)
    assert batch["input_ids"].shape[1] > model.config.get_text_config().max_position_embeddings
    few, many = model(**packed(documents)).loss, model(**batch).loss
    torch.testing.assert_close(many, few)


def test_each_packed_document_halts_by_itself(make_model: Make, documents: list[Tensor]) -> None:
    model = make_model(**ACT).train()
    with torch.no_grad():  # between the documents' means: some halt after the first segment, others go on
        states = [model.get_decoder()(document[None]).last_hidden_state for document in documents]
        values = [model.hrm(h, segments=1).segments[0].q for h in states]
        margins = [(q[..., 0] - q[..., 1]).mean() for q in values if q is not None]
        model.hrm.b_q[0] -= torch.stack(margins).median() + 1e-3
    out = model(**packed(documents)).token_segments[0].split(LENGTHS)
    own = [model(**alone(document)).token_segments[0] for document in documents]
    assert len({int(depth[0]) for depth in own}) > 1  # else nothing would show
    assert all(torch.equal(a, b) for a, b in zip(out, own, strict=True))


def test_weights_of_segments(make_model: Make, ids: Tensor) -> None:
    model = make_model(segments=3, segment_weights=[1.0, 0.0, 3.0])
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss.detach(), (out.segment_losses * torch.tensor([0.25, 0.0, 0.75])).sum())


@pytest.mark.parametrize(("count", "size", "batch_size"), [(5, 2, 4), (3, 4, 4), (4, 2, 2), (1, 3, 3), (2, 3, 7)])
def test_no_part_is_wider_than_the_widest(count: int, size: int, batch_size: int) -> None:
    lengths = [3 ** (count - n) for n in range(count)]
    widths = {
        sum(lengths[place.row] for place in places[start : start + size])
        for seed in range(20)
        for places in BatchPlan(lengths, batch_size=batch_size, steps=20, seed=seed)
        for start in range(0, batch_size, size)
    }
    widest = widest_part(lengths, size, batch_size)
    assert max(widths) <= widest
    assert max(widths) == widest or count % batch_size == 0  # then no batch reaches into the next pass
