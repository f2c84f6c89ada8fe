"""Decoding with the cache gives what decoding without it gives."""

import pytest
import torch
from small_models import ACT, VOCABULARY
from transformers import DynamicCache

import hrm_kernels
from hrm.core import CoreOutput
from hrm.modeling import HRMCache

MODES = [{"segments": 2}, ACT]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("mode", MODES, ids=["fixed", "act"])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_uncached(make_model, kind, ids, mode, padded):
    model = make_model(kind, **mode)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    cached, plain = (
        model.generate(
            ids, attention_mask=mask, use_cache=use, return_dict_in_generate=True, output_logits=True, **GREEDY
        )
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 6], [3, 4, 5]])
def test_cache_in_any_pieces_equals_one_pass_while_tokens_halt_at_different_depths(make_model, kind, ids, pieces):
    model = make_model(kind, **ACT)
    with torch.no_grad():
        whole = model(ids)
        cache, logits, depths = None, [], []
        for piece in ids.split(pieces, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
            depths.append(out.token_segments)
    assert whole.token_segments.unique().numel() > 2  # the case really occurs
    assert torch.equal(torch.cat(depths, 1), whole.token_segments)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-3, atol=1e-4)
    assert cache.slots.length == cache.get_seq_length() == 12
    assert cache.slots.depth == whole.token_segments.max()


def test_what_a_halted_token_offers_matters(make_model, ids):
    """Guards the test above: with all tokens at full depth the later logits are others."""
    model = make_model(**ACT)
    with torch.no_grad():
        halting, full = model(ids), model(ids, segments=4)
    deep = halting.token_segments == 4
    assert (halting.logits[deep] - full.logits[deep]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES, ids=["fixed", "act"])
def test_beam_search_with_and_without_cache(make_model, kind, ids, mode):
    model = make_model(kind, **mode)
    cached, plain = (
        model.generate(ids, num_beams=3, num_return_sequences=2, use_cache=use, **GREEDY) for use in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.fixture
def uneven():
    """Five prompts of 6 to 12 tokens, padded on the left: (5, 12) ids and mask."""
    tokens = torch.randint(1, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(4))
    return tokens, (torch.arange(12) >= torch.tensor([0, 3, 6, 1, 0])[:, None]).long()


def run_rows_alone(monkeypatch, core):
    """Makes the core run each row of a batch by itself, where no other can be left out; without a cache."""
    plain = core.forward

    def forward(h, *, attention_mask=None, position_ids=None, cache=None, **settings):
        assert cache is None
        rows = []
        for row in range(len(h)):
            one = slice(row, row + 1)
            mask = None if attention_mask is None else attention_mask[one]
            places = position_ids if position_ids is None or len(position_ids) == 1 else position_ids[one]
            rows.append(plain(h[one], attention_mask=mask, position_ids=places, **{**settings, "carry": None}))
        return CoreOutput([], *(torch.cat([getattr(out, name) for out in rows]) for name in ("z_h", "segments_used")))

    monkeypatch.setattr(core, "forward", forward)


@pytest.mark.parametrize("beams", [1, 3])
def test_leaving_out_rows_that_halted_gives_what_each_row_gives_alone(monkeypatch, make_model, kind, uneven, beams):
    model, (tokens, mask) = make_model(kind, **ACT), uneven
    depths, outputs = [], []

    def generate(use_cache):
        depths.clear()
        watch = model.hrm.register_forward_hook(lambda _, __, out: depths.append(out.segments_used))
        settings = {"num_beams": beams, "return_dict_in_generate": True, "output_logits": True, "use_cache": use_cache}
        outputs.append(model.generate(tokens, attention_mask=mask, **settings, **GREEDY))
        watch.remove()
        return torch.cat(depths, 1) if use_cache else depths[-1]

    cached, plain = generate(True), generate(False)
    run_rows_alone(monkeypatch, model.hrm)
    alone = generate(False)
    assert torch.equal(plain, alone)
    assert beams > 1 or torch.equal(cached, alone)  # beams swap rows, and what was counted stays where it was
    for out in outputs[:2]:
        assert torch.equal(out.sequences, outputs[2].sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(outputs[2].logits), rtol=1e-3, atol=1e-3)
    assert alone.unique().numel() > 2  # the case really occurs


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_gives_what_each_row_gives_alone(monkeypatch, make_model, kind, uneven, side):
    model, (tokens, mask) = make_model(kind, **ACT), uneven
    mask = mask if side == "left" else mask.flip(1)
    together = model(tokens, attention_mask=mask)
    run_rows_alone(monkeypatch, model.hrm)
    alone = model(tokens, attention_mask=mask)
    assert torch.equal(together.token_segments, alone.token_segments)
    torch.testing.assert_close(together.logits[mask.bool()], alone.logits[mask.bool()], rtol=1e-3, atol=1e-3)


def test_generating_computes_the_rows_that_go_on_and_no_others(monkeypatch, make_model, kind, uneven):
    model, (tokens, mask) = make_model(kind, **ACT), uneven
    got, wanted, rows, plain = [], [], [], hrm_kernels.l_recurrence

    def recur(z, *args, **kwargs):
        got.append(len(z))
        return plain(z, *args, **kwargs)

    def count(_, __, out):
        for segment in out.segments:
            rows.append(int(segment.active.any(1).sum()))
            wanted.extend([rows[-1] * segment.active.shape[1]] * model.hrm.config.h_cycles)

    monkeypatch.setattr(hrm_kernels, "l_recurrence", recur)
    model.hrm.register_forward_hook(count)
    model.generate(tokens, attention_mask=mask, **GREEDY)
    assert got == wanted
    assert set(rows) >= {1, 5}  # the case really occurs


def test_sampling_is_seeded_and_batched(make_model, ids):
    model = make_model(**ACT)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=3, pad_token_id=0))
    assert draws[0].shape == (6, 18)
    assert torch.equal(*draws)
    assert draws[0][:, 12:].unique(dim=0).shape[0] > 1


def test_a_left_padded_row_generates_what_it_generates_alone(make_model, kind, ids):
    model = make_model(kind, **ACT)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    alone = model.generate(ids[:1, 4:], **GREEDY)
    assert torch.equal(together[0, 12:], alone[0, 8:])


def test_generate_takes_a_number_of_segments(make_model, ids):
    model = make_model(**ACT)
    one, four = (model.generate(ids, segments=number, **GREEDY) for number in (1, 4))
    assert not torch.equal(one, four)


def test_cache_is_cropped_repeated_selected_and_reset_as_one(make_model, ids):
    model = make_model("qwen3", **ACT)
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-3)
        out = model(ids[:, 9:], past_key_values=cache)
        torch.testing.assert_close(out.logits[:, -1], wanted, rtol=1e-3, atol=1e-4)
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        out = model(ids[:, 11:].flip(0), past_key_values=cache)
    torch.testing.assert_close(out.logits[:, -1], wanted.flip(0), rtol=1e-3, atol=1e-4)
    cache.reset()
    assert cache.slots.length == cache.slots.depth == 0


def test_a_cache_that_is_not_ours_is_refused(make_model, ids):
    model = make_model()
    with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache; it should be an HRMCache"):
        model(ids, past_key_values=DynamicCache(config=model.config.backbone))
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        model.generate(ids, cache_implementation="static", **GREEDY)


def test_a_cache_keeps_no_gradients(make_model, ids):
    model = make_model(grad_cycles=2)
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        model(ids, past_key_values=HRMCache(model.config))


def test_only_the_last_logits_are_built_while_generating(make_model, ids):
    model = make_model()
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    model.generate(ids, **GREEDY)
    assert set(shapes) == {(2, 1, VOCABULARY)}
