"""The quickstart in small form, and answers from what it leaves."""

import io
import json

import pytest
from tiny_backbone import TINY_CORE, save_tiny_backbone

from hrm import HRMGemmaForCausalLM
from hrm.cli import main

pytest.importorskip("reasoning_gym", reason="the extra demo is not installed")

SMALL = [
    "data.task=chain_sum",
    "data.task_options={max_terms: 2, max_digits: 1}",
    "data.size=60",
    "data.held_out=8",
    "train.steps=16",
    "train.core_lr=0.01",
    "train.adapter_lr=0.01",
    "eval.max_new_tokens=4",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run folder and console text of one small quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    backbone = save_tiny_backbone(folder / "backbone")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        arguments = [f"hrm.backbone={backbone}", f"run.folder={folder / 'runs'}", *TINY_CORE, *SMALL]
        assert main(["quickstart", *arguments]) == 0
    (run,) = (folder / "runs").iterdir()
    return run, out.getvalue()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder_is_complete(finished):
    run, _ = finished
    assert run.name.startswith("quickstart-")
    assert {path.name for path in run.iterdir()} == {
        "accuracy.png", "answers-after.jsonl", "answers-before.jsonl", "answers-before-2-shots.jsonl",
        "answers-commonest-answer.jsonl", "checkpoint", "checkpoints",
        "config.yaml", "convergence.png", "gradient.png", "halting.png", "loss.png", "metrics.jsonl", "speed.png",
    }  # fmt: skip
    for plot in ("accuracy.png", "loss.png"):
        assert (run / plot).read_bytes().startswith(b"\x89PNG")
    assert "d_l: 32" in (run / "config.yaml").read_text()


def test_the_loss_fell(finished):
    losses = [row["loss"] for row in rows(finished[0] / "metrics.jsonl") if row["event"] == "step"]
    assert len(losses) == 16
    assert sum(losses[-4:]) / 4 < 0.93 * losses[0]  # the random frozen head leaves no more to gain so soon


def test_before_and_after_are_logged_and_shown(finished):
    run, text = finished
    evaluations = [row for row in rows(run / "metrics.jsonl") if row["event"] == "evaluation"]
    assert [row["when"] for row in evaluations] == ["commonest answer", "before", "before, 2 shots", "after"]
    for row in evaluations:
        answers = rows(run / f"answers-{row['when'].replace(', ', '-').replace(' ', '-')}.jsonl")
        assert row["of"] == len(answers) == 8
        assert row["right"] == sum(answer["score"] == 1 for answer in answers)
        assert f"{row['when']}: {row['right']} of 8 right" in text
    for word in ("expected:", "before:", "after:", f"hrm generate run={run}"):
        assert word in text


def test_generate_answers_a_prompt(finished, capsys):
    arguments = [f"run={finished[0]}", "prompt=1 + 1 =", "max_new_tokens=4"]
    assert main(["generate", *arguments]) == 0
    first = capsys.readouterr()
    assert first.out.count("\n") >= 1
    assert "segments used: 1.00 a token" in first.err
    assert main(["generate", *arguments, "hrm.segments=2", "hrm.fused=false"]) == 0
    assert "segments used: 2.00 a token" in capsys.readouterr().err


def test_generate_answers_each_line_of_standard_input(finished, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1 =\n2 + 2 =\n"))
    assert main(["generate", f"run={finished[0] / 'checkpoint'}", "max_new_tokens=2", "temperature=1.0"]) == 0
    assert capsys.readouterr().err.count("segments used") == 2


def test_a_damaged_checkpoint_is_one_line_and_status_2(finished, tmp_path, capsys):
    HRMGemmaForCausalLM.from_pretrained(finished[0] / "checkpoint").config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    assert main(["generate", f"run={tmp_path}", "prompt=x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
