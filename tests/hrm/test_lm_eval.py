"""`hrm lm-eval`: lm-eval's numbers are those of decoding and scoring by hand, at any batch size, without the hub."""

import json
import math
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from small_models import seem_trained
from tiny_backbone import byte_tokenizer, save_tiny_backbone
from transformers import AutoModelForCausalLM

from hrm import HRMGemmaForCausalLM
from hrm.evaluate import answer
from hrm.generate import load_trained
from hrm.lm_eval import LmEvalSettings, _set_depth, lm_eval_tasks
from hrm.settings import UsageError, load_settings

lm_eval = pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "hrm-kernels[eval]"')

CORE = {"d_l": 32, "d_h": 32, "head_size": 16, "h_cycles": 2, "l_steps": 2, "attn_heads": 2, "segments": 2}
QUESTIONS = ["2 + 3?", "How many legs have 3 dogs and 2 hens?", "7 * 6?", "A dozen less one?", "10 - 4 + 1?"]
NEW_TOKENS = 10
CHOICES = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
CAPITALS = [
    {"question": "The capital of France is", "choices": ["Rome", "Paris, on the Seine"], "label": 1},
    {"question": "Oslo is in", "choices": ["Norway", "Peru"], "label": 0},
    {"question": "Of Italy it is", "choices": ["Bern", "Rome"], "label": 0},
]


@pytest.fixture(autouse=True)
def _no_network_and_no_trace(monkeypatch, tmp_path_factory):
    """Nothing is asked of the hub, and nothing is kept in the user's cache."""
    import datasets

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **named: asked.append(host) or [])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # datasets' counter of its own loads
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists packages: seconds
    yield
    assert asked == []


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A tiny model that likes to write digits, so that there is something to extract."""
    folder = save_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), byte_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("0123456789")["input_ids"]] *= 4
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(backbone, tmp_path_factory) -> Path:
    """A core of two segments on it, with weights that matter."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_with_core(backbone, folder, trained=True)
    return folder


def save_with_core(backbone: Path, folder: Path, trained: bool, **hrm) -> None:
    model = HRMGemmaForCausalLM.from_backbone(str(backbone), hrm={**CORE, **hrm}, lora=False)
    if trained:
        seem_trained(model)
        model.hrm.w_out.data *= 30  # or the tied embeddings make it repeat one digit
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def by_hand(checkpoint) -> list[str]:
    """What the checkpoint writes after each question, decoded one by one."""
    model, prompts = load_trained(checkpoint), [f"Question: {question}\nAnswer:" for question in QUESTIONS]
    return [answer(model, byte_tokenizer(), [prompt], max_new_tokens=NEW_TOKENS)[0] for prompt in prompts]


@pytest.fixture(scope="module")
def data(by_hand, tmp_path_factory) -> Path:
    """The questions as GSM8K's files; the answers of the first two are what the checkpoint's come down to."""
    folder = tmp_path_factory.mktemp("gsm8k")
    right = [number(text) for text in by_hand[:2]] + ["1,234"] * (len(QUESTIONS) - 2)
    rows = [{"question": q, "answer": f"So.\n#### {n}"} for q, n in zip(QUESTIONS, right, strict=True)]
    write(folder / "test.jsonl", rows)
    write(folder / "train.jsonl", [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)])
    return folder


@pytest.fixture(scope="module")
def capitals(tmp_path_factory) -> Path:
    """Folder of a user's own task, which compares log likelihoods."""
    folder = tmp_path_factory.mktemp("tasks")
    write(folder / "capitals.jsonl", CAPITALS)
    (folder / "capitals.yaml").write_text(CHOICES.replace("FILE", str(folder / "capitals.jsonl")))
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def number(text: str) -> str:
    """The last number in `text`, as GSM8K's flexible filter reads it."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return (found[-1][0] or found[-1][1]) if found else "[invalid]"


def run(**settings):
    words = [f"{name}={value}" for name, value in settings.items()]
    return lm_eval_tasks(load_settings(LmEvalSettings, words))


def gsm8k(checkpoint, data, **settings):
    return run(run=checkpoint, data=data, max_new_tokens=NEW_TOKENS, **{"num_fewshot": 0, **settings})


def written(results, task: str) -> list:
    """What the model answered to each problem, in their order."""
    rows = [row for row in results["samples"][task] if row["filter"] == results["samples"][task][0]["filter"]]
    return [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]


def test_the_task_is_lm_evals_own_but_for_where_its_rows_are():
    from lm_eval.tasks._yaml_loader import load_yaml

    from hrm.lm_eval import TASK_FILES

    ours = load_yaml(TASK_FILES / "gsm8k_local.yaml")
    own = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml")
    differ = {key for key in {*ours, *own} if ours.get(key) != own.get(key)}
    assert differ == {"task", "tag", "dataset_path", "dataset_name", "repeats"}  # repeats: 1, the default


def test_gsm8k_is_what_decoding_and_extracting_by_hand_gives(checkpoint, data, by_hand, tmp_path, capsys):
    results = gsm8k(checkpoint, data, output=tmp_path / "out" / "results.json")
    assert [text.strip() for ((text,),) in written(results, "gsm8k_local")] == by_hand
    assert len({number(text) for text in by_hand}) > 1
    scores = results["results"]["gsm8k_local"]
    assert scores["exact_match,flexible-extract"] == 2 / len(QUESTIONS)
    assert scores["exact_match,strict-match"] == 0  # nothing has taught it ####
    out = capsys.readouterr().out
    assert re.search(r"gsm8k_local\| +3\|flexible-extract\| +0\|exact_match\|. *\| +0\.4\|", out)
    assert out.endswith("segments used: 2.00 a token\n")
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["results"] == json.loads(json.dumps(results["results"]))
    assert kept["segments_used"] == 2


def test_bits_per_byte_are_the_likelihood_of_the_written_out_answers(checkpoint, data, capsys):
    results = run(run=checkpoint, data=data, tasks="gsm8k_bits", segments=3)
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    model, tokenizer = load_trained(checkpoint), byte_tokenizer()
    nats = [likelihood(model, tokenizer, f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in rows]
    expected = -sum(nats) / math.log(2) / sum(len(row["answer"].encode()) for row in rows)
    assert results["results"]["gsm8k_bits"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
    assert "bits_per_byte" in capsys.readouterr().out
    (one, *_) = run(run=checkpoint, data=data, tasks="gsm8k_bits", num_fewshot=2, limit=1)["samples"]["gsm8k_bits"]
    assert re.fullmatch(
        r"(Question: \d \+ 1\?\nAnswer: #### \d\n\n){2}Question: 2 \+ 3\?\nAnswer:", one["arguments"][0][0]
    )


def test_batch_size_changes_nothing(checkpoint, data, capitals):
    one, all_of_them = (
        run(run=checkpoint, data=data, max_new_tokens=NEW_TOKENS, num_fewshot=2, batch_size=size,
            tasks="gsm8k_local, capitals", include_path=capitals)
        for size in (1, 8)
    )  # fmt: skip
    assert written(one, "gsm8k_local") == written(all_of_them, "gsm8k_local")
    likelihoods = [[answers[0][0] for answers in written(r, "capitals")[0]] for r in (one, all_of_them)]
    assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-5)
    assert one["results"] == all_of_them["results"]
    assert one["n-shot"]["gsm8k_local"] == 2
    prompt = one["samples"]["gsm8k_local"][0]["arguments"][0][0]
    assert re.fullmatch(r"(Question: \d \+ 1\?\nAnswer: #### \d\n\n){2}Question: 2 \+ 3\?\nAnswer:", prompt)


def test_log_likelihoods_are_the_models_own(checkpoint, capitals):
    results = run(run=checkpoint, tasks="capitals", include_path=capitals, segments=3)
    model, tokenizer = load_trained(checkpoint), byte_tokenizer()
    right = []
    for row, found in zip(CAPITALS, written(results, "capitals"), strict=True):
        expected = [likelihood(model, tokenizer, row["question"], f" {choice}") for choice in row["choices"]]
        assert [answers[0][0] for answers in found] == pytest.approx(expected, rel=1e-4)
        right.append(expected.index(max(expected)) == row["label"])
    assert results["results"]["capitals"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert results["segments_used"] == results["config"]["segments"] == 3


@torch.no_grad()
def likelihood(model, tokenizer, question: str, choice: str) -> float:
    ids = torch.tensor([tokenizer(question + choice)["input_ids"]])
    scores = model(ids, segments=3).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(scores[-len(tokenizer(choice)["input_ids"]) :].sum())


@pytest.mark.parametrize("act", [False, True])
def test_depth_is_what_is_asked_for(make_model, ids, act):
    model = make_model(act=act, max_segments=4, grad_cycles=2, fused=False)
    expected = model(ids, segments=3).logits
    _set_depth(model, load_settings(LmEvalSettings, ["segments=3"]))
    output = model(ids)
    assert torch.equal(output.logits, expected)
    assert (output.token_segments == 3).all()
    _set_depth(model, load_settings(LmEvalSettings, ["h_cycles=1", "l_steps=5"]))
    assert (model.hrm.config.h_cycles, model.hrm.config.l_steps) == (1, 5)
    assert not torch.allclose(model(ids).logits, expected)
    cached = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_depth_without_a_number_is_the_checkpoints(checkpoint, data):
    assert gsm8k(checkpoint, data, limit=1)["segments_used"] == 2
    assert gsm8k(checkpoint, data, limit=1, segments=1)["segments_used"] == 1


def test_a_plain_model_is_the_baseline(backbone, data, tmp_path, capsys):
    plain = gsm8k(backbone, data)
    assert plain["segments_used"] is None
    assert "segments" not in capsys.readouterr().out
    save_with_core(backbone, tmp_path, trained=False)  # which equals its backbone
    assert written(plain, "gsm8k_local") == written(gsm8k(tmp_path, data), "gsm8k_local")
    with pytest.raises(UsageError, match=r"segments is 2; it should be null: .* is a model without a core"):
        gsm8k(backbone, data, segments=2)


def test_rows_of_another_form_are_named_by_line(checkpoint, data, tmp_path):
    good = (data / "test.jsonl").read_text()
    for row, message in [
        ("{", r"test.jsonl:6: no valid JSON"),
        ('{"question": "a"}', r"test.jsonl:6: no 'answer'; it has 'question'"),
        ('{"question": "a", "answer": "five"}', r"test.jsonl:6: 'answer' ends with 'five'; .*#### NUMBER"),
    ]:
        (tmp_path / "test.jsonl").write_text(good + row)
        with pytest.raises(UsageError, match=message):
            gsm8k(checkpoint, tmp_path)


def test_files_that_are_missing_are_named(checkpoint, data, tmp_path):
    for settings, message in [
        ({"data": tmp_path}, r"test.jsonl is no file"),
        ({"data": tmp_path / "gone.jsonl"}, r"gone.jsonl is no file"),
        ({"data": "null"}, r"data is missing; gsm8k_local needs a folder"),
        ({"run": tmp_path / "gone"}, r"gone', which holds no checkpoint"),
        ({"run": "null"}, r"run is None; it should be given"),
        ({"include_path": tmp_path / "gone"}, r"include_path is '.*gone'; it should be a folder, or null"),
        ({"output": data / "test.jsonl" / "x.json"}, r"output is '.*x.json', and cannot be written to"),
    ]:
        with pytest.raises(UsageError, match=message):
            run(**{"run": checkpoint, "data": data, "num_fewshot": 0, **settings})
    alone = tmp_path / "alone.jsonl"
    alone.write_text((data / "test.jsonl").read_text())
    with pytest.raises(UsageError, match=r"train.jsonl is no file; it should hold the few-shot examples"):
        run(run=checkpoint, data=alone)
    assert gsm8k(checkpoint, alone, limit=2)["n-samples"]["gsm8k_local"]["effective"] == 2


def test_settings_that_make_no_sense(checkpoint, data, capitals, monkeypatch):
    from lm_eval.tasks import TaskManager

    def few(include_path, include_defaults=True):  # lm-eval's own 14,000 files take long to read
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    for settings, message in [
        ({"tasks": "gsm8k_lokal"}, "lm-eval does not know 'gsm8k_lokal'; the nearest is 'gsm8k_local'"),
        ({"tasks": " ,"}, "it should be names of tasks with commas between them"),
        ({"tasks": "capitals", "include_path": capitals}, "it should be null without a task that reads it"),
        ({"num_fewshot": 5}, "num_fewshot is 5; it should be at most the rows of .*train.jsonl, 4"),
        ({"num_fewshot": -1}, "num_fewshot is -1; it should be at least 0, or null"),
        ({"limit": 0}, "limit is 0; it should be at least 1, or null"),
        ({"l_steps": 0}, "l_steps is 0; it should be at least 1, or null"),
        ({"h_cycles": 2**31}, "h_cycles is 2147483648; it should be below 2147483648"),
        ({"seed": -1}, "seed is -1; it should be from 0 to 4294967295"),
        ({"max_new_tokens": 512, "num_fewshot": 0}, "max_new_tokens is 512; the model has 512 for prompt and answer"),
    ]:
        with pytest.raises(UsageError, match=message):
            run(**{"run": checkpoint, "data": data, **settings})


def test_without_lm_eval_it_says_what_to_install(checkpoint, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r'needs the package lm-eval; pip install "hrm-kernels\[eval\]"'):
        gsm8k(checkpoint, data)
