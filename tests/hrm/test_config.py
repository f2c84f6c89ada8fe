import json

import pytest

from hrm import HRMConfig


def test_defaults_are_those_of_the_design():
    config = HRMConfig()
    assert (config.d_l, config.d_h, config.head_size, config.h_cycles, config.l_steps) == (2048, 4096, 64, 4, 8)
    assert (config.grad_cycles, config.grad_l_steps, config.l_reset, config.h_mixer) == (1, 1, "carry", "attention")
    assert (config.attn_heads, config.attn_kv_heads) == (64, 8)
    assert config.fused == "auto"


@pytest.mark.parametrize("d_h", [48, 208, 1088, 1600, 3840, 5376])
def test_any_width_has_heads_by_default(d_h):
    config = HRMConfig(d_h=d_h, head_size=16)
    assert 1 <= config.attn_heads <= max(1, d_h // 64)
    assert 1 <= config.attn_kv_heads <= max(1, config.attn_heads // 8)


def test_without_a_mixer_its_heads_do_not_matter():
    assert HRMConfig(d_h=15, d_l=9, head_size=3, h_mixer="none").d_h == 15


def test_survives_json():
    config = HRMConfig(d_l=128, d_h=256, act=True, max_segments=4, fused=False)
    assert HRMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_max_segments_is_at_least_segments():
    assert HRMConfig(segments=3).max_segments == 3
    assert HRMConfig(segments=3, max_segments=5).max_segments == 5


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("d_l", 100, "a multiple of head_size = 64"),
        ("d_h", 100, "a multiple of head_size = 64"),
        ("d_h", 0, "at least 1"),
        ("d_h", "wide", "a whole number"),
        ("h_cycles", 0, "at least 1"),
        ("l_steps", -1, "at least 1"),
        ("l_steps", 2.0, "a whole number"),
        ("l_steps", True, "a whole number"),
        ("grad_l_steps", 9, "from 1 to l_steps = 8"),
        ("grad_cycles", 5, "from 1 to h_cycles = 4"),
        ("grad_cycles", 0, "at least 1"),
        ("l_reset", "zero", "'carry' or 'init'"),
        ("h_mixer", "conv", "'attention' or 'none'"),
        ("attn_heads", 3, "heads of an even size"),
        ("attn_kv_heads", 7, "a divisor of attn_heads = 64"),
        ("rope_theta", 0, "above 0"),
        ("norm_eps", float("nan"), "above 0"),
        ("norm_eps", float("inf"), "a finite number"),
        ("q_loss_weight", -0.5, "at least 0"),
        ("min_segments", 2, "from 1 to max_segments = 1"),
        ("exploration", 1.5, "a probability, 0 to 1"),
        ("segment_price", -1, "at least 0"),
        ("q_target", "dqn", "'bootstrap', 'replay' or 'none'"),
        ("q_gradient", "all", "'trunk' or 'head'"),
        ("replay_size", 0, "at least 1"),
        ("segment_weights", [0.0], "one of them above 0"),
        ("stop_residual", -1.0, "at least 0"),
        ("act", 1, "True or False"),
        ("fused", "yes", "True, False or 'auto'"),
        ("fused", 1, "True, False or 'auto'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        HRMConfig(**{field: value})
    assert f"{field} is {value!r}" in str(error.value)
    assert allowed in str(error.value)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match="no field 'l_step'; the nearest is 'l_steps'"):
        HRMConfig.from_dict({"l_step": 4})
