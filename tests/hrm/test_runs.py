"""The lines that a run leaves in its folder."""

import json

from hrm.runs import append_line, bring_back, forget_after, keep_lines, read_lines


def test_lines_are_strict_json_and_come_back(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    append_line(path, {"step": 1, "loss": float("nan"), "norm": float("-inf"), "when": "before", "count": 3})
    text = path.read_text()
    assert text.endswith("\n")

    def refuse(word):
        raise AssertionError(f"{word} is not strict JSON")

    json.loads(text, parse_constant=refuse)
    assert read_lines(path) == [{"step": 1, "loss": "nan", "norm": "-inf", "when": "before", "count": 3}]
    assert float("-inf") == float(read_lines(path)[0]["norm"])


def test_forgetting_keeps_earlier_steps_and_lines_without_one(tmp_path):
    path = tmp_path / "lines.jsonl"
    forget_after(path, 3)
    assert not path.exists()
    for line in ({"event": "evaluation"}, {"step": 2}, {"step": 3}, {"step": 4}):
        append_line(path, line)
    with path.open("a") as file:
        file.write('{"step": 1')
    forget_after(path, 3)
    assert path.read_text() == '{"event": "evaluation"}\n{"step": 2}\n{"step": 3}\n'
    forget_after(path, 3, events=("evaluation",))
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["lines.jsonl"]


def test_a_checkpoint_brings_back_the_lines_up_to_it(tmp_path):
    path, folder = tmp_path / "run" / "lines.jsonl", tmp_path / "step-2"
    folder.mkdir()
    keep_lines(path, folder)
    assert (folder / "lines.jsonl").read_text() == ""
    for line in ({"event": "evaluation", "step": 0}, {"step": 1}, {"step": 2}):
        append_line(path, line)
    before = path.read_text()
    keep_lines(path, folder)
    append_line(path, {"event": "summary", "step": 2})
    append_line(path, {"step": 3})
    after = path.read_text()
    bring_back(path, folder, 2)
    assert path.read_text() == after  # nothing was lost
    path.write_text(after[-20:])  # cut short at its beginning
    bring_back(path, folder, 2)
    assert path.read_text() == before + '{"step": 3}\n'
    path.write_text('{"event": "evaluation", "step": 0, "made": "again"}\n' + before[:-5])
    bring_back(path, folder, 2)
    assert path.read_text() == before
    path.unlink()
    bring_back(path, folder, 2)
    assert path.read_text() == before
