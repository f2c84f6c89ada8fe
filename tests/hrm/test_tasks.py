"""Problems of known depth, and answers judged without decoding."""

import itertools
import re

import pytest
import torch
from tiny_backbone import TINY_CORE, byte_tokenizer, save_tiny_backbone

from hrm import HRMGemmaForCausalLM
from hrm.batching import micro_batches, scored_tokens
from hrm.data import Encoded, Template, encode, load_problems
from hrm.evaluate import predict
from hrm.loss import IGNORED
from hrm.settings import TrainingSettings, UsageError, load_settings
from hrm.tasks import texts
from hrm.trainer import digest_rows


def problems(task, options, seed):
    return ((text + asked[0][0], *asked[0][1:]) for text, asked in texts(task, options, seed))


def swapped(prompt):
    row, rest = re.fullmatch(r"([A-Z ]+)\.((?: \d+ \d+,)*) at (\d+)\?", prompt).group(1, 2), prompt
    objects = row[0].split()
    for one, other in re.findall(r" (\d+) (\d+),", rest):
        one, other = int(one) - 1, int(other) - 1
        assert one != other
        objects[one], objects[other] = objects[other], objects[one]
    return objects[int(rest.rpartition("at ")[2][:-1]) - 1], len(re.findall(",", rest))


def chased(prompt):
    follows = dict(re.findall(r"([A-Z]) ([A-Z]),", prompt))
    assert sorted(follows) == sorted(follows.values())
    depth, place = re.search(r"(\d+) from ([A-Z])\?", prompt).groups()
    for _ in range(int(depth)):
        place = follows[place]
    return place, int(depth)


@pytest.mark.parametrize(("task", "solve"), [("object_swaps", swapped), ("pointer_chase", chased)])
def test_answers_and_depths_are_right(task, solve):
    options = {"objects": 7, "min_depth": 0, "max_depth": 6}
    found = list(itertools.islice(problems(task, options, 3), 400))
    assert all(solve(prompt) == (answer, depth) for prompt, answer, depth in found)
    assert {depth for _, _, depth in found} == set(range(7))
    assert found == list(itertools.islice(problems(task, options, 3), 400))
    assert found != list(itertools.islice(problems(task, options, 4), 400))


def test_arrows_go_round_all_objects():
    for prompt, _, _ in itertools.islice(problems("pointer_chase", {"objects": 6, "max_depth": 5}, 0), 20):
        arrows = dict(pair.split() for pair in prompt.rpartition(",")[0].split(", "))
        seen = {place := "A"}
        while (place := arrows[place]) not in seen:
            seen.add(place)
        assert seen == set(arrows) == set("ABCDEF")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "the nearest is"),
        ({"objects": 1}, "from 2 to 26"),
        ({"min_depth": 5, "max_depth": 4}, "from 0 to max_depth = 4"),
        ({"max_depth": "far"}, "a whole number"),
        ({"questions": 0}, "at least 1"),
        ({"questions": 6}, "questions is 6; it should be from 1 to 5"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        next(problems("object_swaps", options, 0))


@pytest.mark.parametrize(("task", "solve"), [("object_swaps", swapped), ("pointer_chase", chased)])
def test_further_questions_are_about_the_same_text(task, solve):
    for text, asked in itertools.islice(texts(task, {"objects": 7, "max_depth": 6, "questions": 5}, 0), 30):
        assert len({question for question, _, _ in asked}) == 5
        assert all(solve(text + question) == (answer, depth) for question, answer, depth in asked)


def test_answers_to_further_questions_are_learnt_where_the_question_ends_and_stand_nowhere_in_the_text():
    data = settings("data.task=pointer_chase", "data.task_options={objects: 7, max_depth: 3, questions: 3}").data
    found, tokenizer = load_problems(data, 0), byte_tokenizer()
    assert {len(example.turns) for example in found.train} == {2} and not any(e.turns for e in found.held_out)
    rows = encode(found.train[:4], Template("{prompt}{answer}"), tokenizer, 512)
    for example, row in zip(found.train, rows, strict=False):
        (first, a), (second, b) = example.turns
        assert tokenizer.decode(row.tokens) == f"{example.prompt}{first}{second}{b}<eos>"
        places = [place for place, label in enumerate(row.labels) if label != IGNORED]
        assert tokenizer.decode([row.labels[place] for place in places]) == f"{example.answer}{a}{b}<eos>"
        ends = [tokenizer.decode(row.tokens[:place]) for place in places[:3]]
        assert ends == [example.prompt, example.prompt + first, example.prompt + first + second]
    (row,) = encode(found.train[:1], Template("Q: {prompt}\nA:{answer}"), tokenizer, 512)
    asked = [found.train[0].prompt, *(question.strip() for question, _ in found.train[0].turns)]
    text = "\n".join(f"Q: {question}\nA:" for question in asked)
    assert tokenizer.decode(row.tokens) == f"{text}{found.train[0].turns[1][1]}<eos>"
    assert scored_tokens(rows) == sum(label != IGNORED for row in rows for label in row.labels) == 4 * 4
    with pytest.raises(UsageError, match=r"'A' and 'B' begin with the same token.*questions should be 1"):
        encode(found.train, Template("{prompt} {answer}"), tokenizer, 512)  # a space, then the letter
    (packed,), (padded,) = (micro_batches(rows, 4, 0, pack=pack) for pack in (True, False))
    real = padded["attention_mask"].bool()
    assert torch.equal(packed["labels"][0], padded["labels"][real])
    assert torch.equal(packed["input_ids"][0], padded["input_ids"][real])
    assert digest_rows(rows) != digest_rows([Encoded(row.prompt, row.answer) for row in rows])
    longest = max(len(row.tokens) for row in rows)
    with pytest.raises(UsageError, match=f"at most data.max_length = {longest - 1}"):
        encode(found.train[:4], Template("{prompt}{answer}"), tokenizer, longest - 1)


def test_arrows_are_not_followed_round_the_whole_ring():
    with pytest.raises(UsageError, match=r"max_depth is 6; it should be below objects = 6"):
        next(problems("pointer_chase", {"objects": 6, "max_depth": 6}, 0))
    prompt, answer, depth = next(problems("pointer_chase", {}, 0))
    assert chased(prompt) == (answer, depth) and prompt.count(",") > 2 * 10  # no shorter way back


def settings(*overrides):
    return load_settings(TrainingSettings, ["data.task=object_swaps", "data.size=50", "data.held_out=20", *overrides])


def test_held_out_problems_may_be_deeper_and_are_never_trained_on():
    found = load_problems(settings("data.held_out_options.min_depth=11", "data.held_out_options.max_depth=14").data, 0)
    assert len(found.train) == 50 and len(found.held_out) == 20
    assert {example.entry["depth"] for example in found.train} <= set(range(1, 11))
    assert {example.entry["depth"] for example in found.held_out} <= set(range(11, 15))
    assert not {example.prompt for example in found.train} & {example.prompt for example in found.held_out}
    with pytest.raises(
        UsageError, match=r"gave \d+ different problems; it should give 50"
    ):  # nearly all texts hold a held-out one
        few = "data.task_options={objects: 3, max_depth: 1, questions: 3}"
        load_problems(settings(few, "data.held_out=90").data, 0)
    with pytest.raises(UsageError, match=r"held_out_options\.questions is 3; it should be 1"):
        load_problems(settings("data.held_out_options.questions=3").data, 0)
    with pytest.raises(UsageError, match=r"gave 8 different problems; it should give 20"):
        load_problems(settings("data.task_options.objects=2", "data.task_options.max_depth=1").data, 0)


def test_the_options_that_make_no_sense_are_named():
    with pytest.raises(UsageError, match=r"data\.held_out_options has no 'depth'; the nearest is"):
        load_problems(settings("data.held_out_options.depth=3").data, 0)
    with pytest.raises(UsageError, match=r"data\.held_out_options\.min_depth is 11; it should be from 0 to max_depth"):
        load_problems(settings("data.held_out_options.min_depth=11").data, 0)
    with pytest.raises(UsageError, match=r"data\.task_options\.objects is 1; it should be from 2"):
        load_problems(settings("data.task_options.objects=1", "data.held_out_options.max_depth=3").data, 0)


def test_options_of_the_held_out_problems_are_for_our_tasks_alone():
    words = ["data.task=chain_sum", "data.held_out_options.max_terms=3"]
    with pytest.raises(UsageError, match=r"should be empty but for data.task=object_swaps or pointer_chase"):
        load_problems(load_settings(TrainingSettings, words).data, 0)


def test_judging_without_decoding_is_decoding(tmp_path):
    model = HRMGemmaForCausalLM.from_backbone(
        save_tiny_backbone(tmp_path), hrm={k.split(".")[1].split("=")[0]: int(k.split("=")[1]) for k in TINY_CORE}
    ).eval()
    tokenizer, template = byte_tokenizer(), Template("{prompt}{answer}")
    examples = load_problems(settings().data, 0).held_out
    asked = encode(examples, template, tokenizer, 512)
    rows = []
    for row in asked:
        ids = torch.tensor([row.prompt])
        said = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, len(row.prompt) :]
        rows.append(Encoded(row.prompt, said.tolist()))
    wrong = [Encoded(row.prompt, [(row.answer[0] + 1) % 256 + 2, *row.answer[1:]]) for row in rows]
    assert rows and all(predict(model, rows, 0, batch_size=7))
    assert not any(predict(model, wrong, 0, batch_size=7))
