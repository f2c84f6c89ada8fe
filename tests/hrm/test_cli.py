"""The command line: verbs, keys and values, and what it says of wrong ones."""

import io
from dataclasses import replace

import pytest
import torch

from hrm import HRMConfig
from hrm.cli import VERBS, main, quickstart_defaults
from hrm.settings import (
    LOADING,
    TrainingSettings,
    UsageError,
    cache_folder,
    check_training,
    default_backbone,
    hrm_config,
    keys_of,
    load_settings,
    lora_dict,
    typed_lines,
)


def settings(*overrides: str, defaults=None):
    loaded = load_settings(TrainingSettings, overrides, defaults)
    check_training(loaded)
    return loaded


def test_defaults_are_those_of_the_classes_they_stand_for():
    loaded = settings()
    assert hrm_config(loaded.hrm) == HRMConfig()
    assert lora_dict(loaded.lora) == {"low_rank": 32, "high_rank": 64, "dropout": 0.0}


def test_every_field_of_the_core_but_the_backbones_width_has_a_key():
    keys = {key.name for key in keys_of(TrainingSettings)}
    expected = {f"hrm.{name}" for name in (*HRMConfig().to_dict(), *LOADING)} - {"hrm.hidden_size"}
    assert {key for key in keys if key.startswith("hrm.")} == expected


def test_every_key_is_explained():
    unexplained = [key.name for verb in VERBS.values() for key in keys_of(verb.schema) if not key.doc]
    assert [name for name in unexplained if not name.startswith("lora.")] == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [("hrm.fused=True", True), ("hrm.fused=false", False), ("hrm.fused=auto", "auto")],
)
def test_fused(override, expected):
    assert hrm_config(settings(override).hrm).fused == expected


def test_derived_values_follow_the_overrides():
    assert hrm_config(settings("hrm.d_h=640", "hrm.d_l=640").hrm).attn_heads == 10


def test_values_are_read_by_the_type_of_their_key():
    loaded = settings(
        "data.template=Q: {prompt}\nA: {answer}", "run.name=1", "train.core_lr=1e-4", "data.task_options.max_terms=3",
        "train.steps=null", "data.path=null", "hrm.backbone=a=b",
    )  # fmt: skip
    assert loaded.data.template == "Q: {prompt}\nA: {answer}"
    assert loaded.run.name == "1"
    assert loaded.train.core_lr == 1e-4
    assert loaded.data.task_options == {"max_terms": 3}
    assert loaded.train.steps is None
    assert loaded.data.path is None
    assert loaded.hrm.backbone == "a=b"


def test_overrides_come_after_a_verbs_own_defaults():
    loaded = settings("train.steps=3", defaults=quickstart_defaults())
    assert (loaded.train.steps, loaded.run.name) == (3, "quickstart")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hrm.fusd=True", "unknown key 'hrm.fusd'; the nearest is 'hrm.fused'"),
        ("core_lr=1", "unknown key 'core_lr'; the nearest is 'train.core_lr'"),
        ("data.template.x=1", "unknown key 'data.template.x'"),
        ("hrm=1", "unknown key 'hrm'"),
        ("quick", "'quick' is no setting; settings read section.key=value"),
        ("train.steps=many", "train.steps is 'many'; it should be a whole number or null"),
        ("train.steps=0", "train.steps is 0; it should be at least 1, or null"),
        ("train.steps=9223372036854775808", "; it should be a whole number of at most 64 bits"),
        (
            "hrm.max_segments=1000000000000",
            "hrm.max_segments is 1000000000000; it should be a whole number below 21474",
        ),
        ("train.weight_decay=inf", "train.weight_decay is inf; it should be a finite number, at least 0"),
        ("train.steps=1.5", "train.steps is '1.5'; it should be a whole number"),
        ("train.warmup=1", "train.warmup is 1.0; it should be from 0 to below 1"),
        ("hrm.h_cycles=0", "hrm.h_cycles is 0; it should be a whole number, at least 1"),
        ("hrm.fused=maybe", "hrm.fused is 'maybe'; it should be True, False or 'auto'"),
        ("hrm.act=maybe", "hrm.act is 'maybe'; it should be true or false"),
        ("hrm.grad_l_steps=9", "hrm.grad_l_steps is 9; it should be from 1 to l_steps = 8"),
        ("lora.low_rank=0", "lora.low_rank is 0; it should be a whole number, at least 1"),
    ],
)
def test_wrong_settings_name_key_value_and_what_it_should_be(override, message):
    with pytest.raises(UsageError) as error:
        settings(override)
    assert message in str(error.value)


def test_unknown_verb_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "hrm: unknown verb 'trian'; the nearest is 'train'; see hrm --help\n"


@pytest.mark.parametrize("verb", ["quickstart", "train"])
def test_unknown_key_is_one_line_and_status_2(verb, capsys):
    assert main([verb, "hrm.segmnts=2"]) == 2
    assert capsys.readouterr().err == "hrm: unknown key 'hrm.segmnts'; the nearest is 'hrm.segments'\n"


def test_info_takes_no_keys(capsys):
    assert main(["info", "a=1"]) == 2
    assert capsys.readouterr().err == "hrm: unknown key 'a'; this verb has no keys\n"


def test_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main([]) == 2


def test_help_of_a_verb_shows_its_own_defaults(capsys):
    assert main(["quickstart", "--help"]) == 0
    out = capsys.readouterr().out
    assert f"train.steps={quickstart_defaults()['train']['steps']}\n" in out
    assert "hrm.fused=auto\n" in out


def test_info_says_what_runs_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HRM_HOME", str(tmp_path))
    monkeypatch.setenv("HRM_MODEL_PATH", "some/model")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "l_recurrence", "h_update", "carry_update", str(tmp_path), "some/model"):
        assert word in out


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HRM_HOME", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("HRM_HOME")
    assert cache_folder().parts[-2:] == (".cache", "hrm")
    monkeypatch.delenv("HRM_MODEL_PATH", raising=False)
    assert default_backbone() is None


def test_training_without_a_backbone(monkeypatch, capsys):
    monkeypatch.delenv("HRM_MODEL_PATH", raising=False)
    assert main(["train", "data.task=chain_sum"]) == 2
    assert "hrm.backbone=NAME_OR_PATH, or HRM_MODEL_PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperature=-1", "temperature is -1.0; it should be a finite number, at least 0"),
        ("temperature=.inf", "temperature is inf; it should be a finite number, at least 0"),
        ("max_new_tokens=0", "max_new_tokens is 0; it should be at least 1"),
        ("seed=-1", "seed is -1; it should be from 0 to 4294967295"),
        ("hrm.segments=0", "hrm.segments is 0; it should be at least 1, or null"),
        ("hrm.fused=maybe", "hrm.fused is 'maybe'; it should be true, false or auto"),
    ],
)
def test_wrong_settings_of_generate_are_one_line_and_status_2(tmp_path, capsys, override, message):
    assert main(["generate", f"run={tmp_path}", "prompt=x", override]) == 2
    assert capsys.readouterr().err == f"hrm: {message}\n"


def test_what_is_piped_in_has_to_be_text():
    lines = typed_lines(io.TextIOWrapper(io.BytesIO(b"a\n"), encoding="utf-8"))
    assert list(lines) == ["a\n"]
    with pytest.raises(UsageError, match=r"standard input: no valid UTF-8 \(invalid start byte\)"):
        list(typed_lines(io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nMore"),
        "can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_too_little_memory_is_one_line_and_status_1(error, capsys, monkeypatch):
    def fail(settings):
        raise RuntimeError(error) if isinstance(error, str) else error

    monkeypatch.setitem(VERBS, "info", replace(VERBS["info"], run=fail))
    assert main(["info"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("hrm: out of memory: ") and said.count("\n") == 1


def test_a_fault_of_the_program_stays_one(monkeypatch):
    def fail(settings):
        raise RuntimeError("a fault")

    monkeypatch.setitem(VERBS, "info", replace(VERBS["info"], run=fail))
    with pytest.raises(RuntimeError, match="a fault"):
        main(["info"])


def test_generating_without_a_checkpoint(tmp_path, capsys):
    assert main(["generate", f"run={tmp_path}", "prompt=x"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert main(["generate", f"run={tmp_path}", "prompt=x"]) == 2
    assert "a run on puzzles; hrm solve and hrm evaluate take those" in capsys.readouterr().err
    assert main(["generate", "prompt=x"]) == 2
    assert "run is missing" in capsys.readouterr().err
