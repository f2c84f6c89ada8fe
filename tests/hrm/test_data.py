"""Questions and answers: what is read, what is held out, and what is learnt."""

import itertools
import json

import pytest
import torch
from tiny_backbone import byte_tokenizer

from hrm.data import Encoded, Example, Template, batches, collate, encode, hold_out, load_problems, read_jsonl
from hrm.settings import TrainingSettings, UsageError, load_settings


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(*lines): a file of these lines; what is no text is written as JSON."""

    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def rows(count, start=0):
    return [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(start, start + count)]


def problems(*overrides, seed=0):
    return load_problems(load_settings(TrainingSettings, overrides).data, seed)


def test_reads_rows_and_says_where_they_stand(jsonl):
    path = jsonl({"prompt": "a", "answer": "b"}, "", {"prompt": "ü", "answer": "d", "more": 1})
    assert read_jsonl(path) == [Example("a", "b", f"{path}:1"), Example("ü", "d", f"{path}:3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no valid JSON"),
        ("[1]", "is list; it should be an object"),
        ({"prompt": "a"}, "no 'answer'; it has 'prompt'"),
        ({"prompt": "a", "answer": 3}, "'answer' is int; it should be text"),
        ({"prompt": None, "answer": "b"}, "'prompt' is NoneType; it should be text"),
        ({"prompt": "a", "answer": " "}, "'answer' is empty"),
        ({"prompt": "\ud83d", "answer": "b"}, "'prompt' holds half of a surrogate pair"),
        ('{"prompt": "a", "answer": "b", "n": ' + "9" * 5000 + "}", "cannot be read as JSON (Exceeds the limit"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(jsonl, line, message):
    path = jsonl({"prompt": "a", "answer": "b"}, line)
    with pytest.raises(UsageError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_rows_that_are_no_text_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "answer": "b"}\n')
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: no valid UTF-8"):
        read_jsonl(path)


def test_empty_and_missing_files(jsonl, tmp_path):
    with pytest.raises(UsageError, match="has no rows"):
        read_jsonl(jsonl(""))
    with pytest.raises(UsageError, match="is no file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_columns_can_be_named(jsonl):
    path = jsonl({"question": "a", "solution": "b"})
    assert read_jsonl(path, "question", "solution")[0].answer == "b"


def test_held_out_prompts_are_never_trained_on(jsonl):
    path = jsonl(*rows(40), *rows(40))  # every prompt twice
    found = problems(f"data.path={path}", "data.held_out=4")
    held_out = {e.prompt for e in found.held_out}
    assert len(held_out) == len(found.held_out) == 4
    assert held_out.isdisjoint(e.prompt for e in found.train)
    assert len(found.train) == 72


def test_at_most_a_tenth_is_held_out():
    examples = [Example(str(n), "x", f"f:{n}") for n in range(30)]
    assert len(hold_out(examples, 64, 0).held_out) == 3


def test_one_prompt_alone_cannot_be_trained_and_held_out(jsonl):
    path = jsonl(*rows(1), *rows(1))
    with pytest.raises(UsageError, match="no prompt to train on"):
        problems(f"data.path={path}")


def test_a_file_of_its_own_to_hold_out(jsonl):
    train, held_out = jsonl(*rows(6)), jsonl(*rows(3, start=4), name="test.jsonl")
    found = problems(f"data.path={train}", f"data.held_out_path={held_out}")
    assert [e.answer for e in found.train] == ["1", "2", "3", "4"]
    assert [e.answer for e in found.held_out] == ["5", "6", "7"]


def test_held_out_rows_are_drawn_by_the_seed(jsonl):
    path = jsonl(*rows(100))
    first, again, other = (problems(f"data.path={path}", seed=seed).held_out for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("given", [[], ["data.path=a", "data.task=b"]])
def test_exactly_one_source(given):
    with pytest.raises(UsageError, match=r"should be one of data\.path, data\.dataset and data\.task"):
        problems(*given)


def test_a_hugging_face_data_set(tmp_path, jsonl):
    pytest.importorskip("datasets", reason="the extra data is not installed")
    jsonl(*rows(20), name="train.jsonl")
    found = problems(f"data.dataset={tmp_path}", "data.held_out=2")
    assert len(found.train) == 18
    with pytest.raises(UsageError, match="no 'question'; it has 'prompt', 'answer'"):
        problems(f"data.dataset={tmp_path}", "data.prompt_column=question")


class TestTask:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("reasoning_gym", reason="the extra demo is not installed")

    SMALL = ("data.task=chain_sum", "data.task_options.max_digits=1", "data.size=40", "data.held_out=8")

    def test_problems_differ_and_are_scored_by_the_task(self):
        found = problems(*self.SMALL)
        prompts = [e.prompt for e in (*found.train, *found.held_out)]
        assert len(found.train) == 40
        assert len(found.held_out) == 8
        assert len(set(prompts)) == 48
        assert found.score(found.held_out[0].answer, found.held_out[0]) == 1
        assert found.score("no number", found.held_out[0]) < 1

    def test_deterministic_by_seed(self):
        first, again, other = (problems(*self.SMALL, seed=seed).train for seed in (1, 1, 2))
        assert [e.prompt for e in first] == [e.prompt for e in again]
        assert [e.prompt for e in first] != [e.prompt for e in other]

    def test_unknown_task_names_the_nearest(self):
        with pytest.raises(UsageError, match="the nearest is 'chain_sum'"):
            problems("data.task=chain_sums")

    def test_unknown_option(self):
        with pytest.raises(UsageError, match=r"data\.task_options of chain_sum: .*max_trems"):
            problems("data.task=chain_sum", "data.task_options.max_trems=2")

    def test_too_few_different_problems(self):
        with pytest.raises(UsageError, match="different problems; it should give more than"):
            problems(*self.SMALL, "data.task_options.max_terms=2", "data.held_out=1000")


class TestTemplate:
    def test_spaces_in_front_of_the_answer_go_with_it(self):
        template = Template("Q: {prompt}\nA:  {answer}!")
        assert template.question("1 {x}") == "Q: 1 {x}\nA:"
        assert template.answer("{y}") == "  {y}!"

    def test_solved_examples(self):
        template = Template("{prompt}={answer}")
        assert template.shots([Example("a", "b", ""), Example("c", "d", "")]) == "a=b\n\nc=d\n\n"

    @pytest.mark.parametrize("text", ["", "{prompt}", "{answer}{prompt}", "{prompt}{prompt}{answer}"])
    def test_wrong_ones(self, text):
        with pytest.raises(UsageError, match=r"data\.template is .*it should hold"):
            Template(text)


class TestTokens:
    EXAMPLES = (Example("ab", "c", "f:1"), Example("a", "cd", "f:2"))

    def encoded(self, max_length=9):
        return encode(self.EXAMPLES, Template("{prompt}={answer}"), byte_tokenizer(), max_length)

    def test_answers_end_with_the_end_of_text(self):
        tokenizer = byte_tokenizer()
        first = self.encoded()[0]
        assert tokenizer.decode(first.prompt) == "ab="
        assert tokenizer.decode(first.answer) == "c<eos>"

    def test_too_long(self):
        assert len(self.encoded(max_length=5)) == 2
        with pytest.raises(UsageError, match=r"f:1: prompt and answer have 3 \+ 2 tokens; .*data\.max_length = 4"):
            self.encoded(max_length=4)

    def test_a_prompt_without_tokens(self):
        """Some tokenizers put none in front of a text."""
        template, tokenizer = Template("{prompt} {answer}"), byte_tokenizer()
        with pytest.raises(UsageError, match="f:1: the prompt has no tokens"):
            encode([Example("", "c", "f:1")], template, tokenizer, 9)
        passed: list[str] = []
        assert len(encode([Example("", "c", "f:1"), *self.EXAMPLES], template, tokenizer, 9, passed.append)) == 2
        assert len(passed) == 1

    def test_only_answers_are_scored_and_padding_is_on_the_right(self):
        batch = collate([Encoded([5, 6, 7], [8, 1]), Encoded([5], [9, 1])], pad=0)
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1], [5, 9, 1, 0, 0]]
        assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
        assert batch.labels.tolist() == [[-100, -100, -100, 8, 1], [-100, 9, 1, -100, -100]]

    def test_every_row_comes_once_a_pass(self):
        rows = [Encoded([n], [1]) for n in range(7)]
        stream = batches(rows, batch_size=2, pad=0, seed=3)
        seen = torch.cat([batch.input_ids[:, 0] for batch in itertools.islice(stream, 7)]).tolist()
        assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
        assert seen[:7] != seen[7:]
