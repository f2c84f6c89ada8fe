"""`hrm plot`: pictures of a run from its metrics.jsonl alone."""

import pytest
from matplotlib.image import imread

from hrm.plot import PlotSettings, plot, plot_run
from hrm.runs import append_line
from hrm.settings import UsageError, load_settings


def a_line(step, segments=3):
    """What a step logs."""
    by_segment = {f"{key}_{m}": 1 / (m + step) for m in range(1, segments + 1)
                  for key in ("segment_loss", "residual_l", "residual_h")}  # fmt: skip
    return {
        "event": "step", "step": step, "loss": 2 / step, "grad_norm": 3 / step, "learning_rate": 1e-3,
        "adapter_lr": 5e-4, "segments": 2.5, "q_halt": -5 + step, "q_continue": -4.0, "residual_l": 0.1 / step,
        "residual_h": 0.2 / step, "tokens_per_second": 4000.0, "memory_gb": 3.5, "skipped_steps": step // 4,
        "micro_batch": 8, "epoch": step / 10, **by_segment,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """run(*lines): a run folder with these metrics."""

    def make(*lines):
        for line in lines:
            append_line(tmp_path / "run" / "metrics.jsonl", line)
        return tmp_path / "run"

    return make


@pytest.fixture
def panels(monkeypatch):
    """The axes of every figure that is saved, by the file's stem."""
    from matplotlib.figure import Figure

    saved, save = {}, Figure.savefig

    def remember(figure, path, **options):
        saved[path.stem] = figure.axes
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


def test_every_picture_is_drawn_with_labels_and_what_the_lines_say(run, panels):
    folder = run({"event": "evaluation", "step": 0, "eval_loss": 3.0}, *(a_line(step) for step in range(1, 10)))
    paths = plot_run(folder)
    assert [path.name for path in paths] == [
        f"{name}.png" for name in ("loss", "convergence", "halting", "speed", "gradient")
    ]
    assert all(imread(path).std() > 0 for path in paths)
    assert [len(axes) for axes in panels.values()] == [2, 2, 2, 2, 2]
    for axes in (axes for row in panels.values() for axes in row):
        assert axes.get_xlabel() in ("step", "segment") and axes.get_ylabel() and axes.get_title()
    loss, by_segment = panels["loss"]
    assert loss.get_lines()[0].get_xydata().tolist() == [[step, 2 / step] for step in range(1, 10)]
    assert [curve.get_label() for curve in by_segment.get_lines()] == ["1", "2", "3"]
    states, last = panels["convergence"]
    assert states.get_yscale() == "log"
    assert [curve.get_ydata()[-1] for curve in states.get_lines()] == pytest.approx([0.1 / 9, 0.2 / 9])
    assert last.get_lines()[0].get_xydata().tolist() == [[m, 1 / (m + 9)] for m in (1, 2, 3)]
    assert "step 9" in last.get_title()
    assert panels["gradient"][0].get_lines()[1].get_xdata().tolist() == [4, 8]  # skipped


def test_missing_keys_leave_their_panel_out(run, panels):
    lines = [{"event": "step", "step": step, "loss": 1.0, "segments": 2.0, "memory_gb": 1.0} for step in (1, 2)]
    assert [path.stem for path in plot_run(run(*lines))] == ["loss", "halting", "speed"]
    assert {name: [axes.get_title() for axes in row] for name, row in panels.items()} == {
        "loss": ["Training loss"],
        "halting": ["Segments used"],
        "speed": ["Memory"],
    }


@pytest.mark.filterwarnings("error")
def test_one_step_whose_numbers_are_not_finite_or_zero_can_be_drawn(run):
    line = {**a_line(1), "loss": float("nan"), "grad_norm": float("inf"), "residual_l": 0.0, "residual_h": 0.0}
    assert len(plot_run(run(line))) == 5


def test_a_line_that_is_being_written_is_left_out(run, panels):
    folder = run(a_line(1), a_line(2))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 3, "lo')
    plot_run(folder)
    assert panels["loss"][0].get_lines()[0].get_xdata().tolist() == [1, 2]


def test_the_command_writes_where_it_is_told_and_prints_the_names(run, tmp_path, capsys):
    folder = run(a_line(1), a_line(2))
    plot(load_settings(PlotSettings, [f"run={folder}", f"output={tmp_path / 'pictures'}"]))
    assert sorted(capsys.readouterr().out.split()) == sorted(str(path) for path in (tmp_path / "pictures").iterdir())
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_what_cannot_be_plotted_is_said(run, tmp_path):
    with pytest.raises(UsageError, match="run is None; it should be given: hrm plot FOLDER"):
        plot(load_settings(PlotSettings, []))
    with pytest.raises(UsageError, match=r"nowhere/metrics.jsonl is no file; it should be"):
        plot_run(tmp_path / "nowhere")
    folder = run({"event": "evaluation", "step": 0, "eval_loss": 3.0})
    with pytest.raises(UsageError, match=r"metrics.jsonl has no line of a training step"):
        plot_run(folder)
    run(a_line(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output is '.*file', and cannot be written to"):
        plot_run(folder, tmp_path / "file")
