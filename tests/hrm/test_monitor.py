"""What one watches of a training: lines, Prometheus (scraped by a real one where it is installed), the bar."""

import io
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import torch
from rich.console import Console
from tiny_backbone import TINY_CORE, save_tiny_backbone
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from hrm.monitor import COUNTERS, GAUGES, JsonlCallback, ProgressCallback, PrometheusCallback, check_integrations
from hrm.runs import read_lines
from hrm.settings import UsageError, load_training_settings
from hrm.train import Job, fine_tune

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "hrm-dashboard.json"
LOGS = {
    "loss": 2.25, "grad_norm": 1.5, "learning_rate": 1e-3, "adapter_lr": 5e-4, "segments": 2.5, "segment_loss_1": 3.0,
    "segment_loss_2": 2.0, "q_halt": -4.5, "q_continue": -4.0, "q_loss": 0.5, "residual_l": 0.25, "residual_h": 0.125,
    "residual_l_1": 0.5, "residual_h_1": 0.75, "tokens_per_second": 4000.0, "memory_gb": 3.5, "skipped_steps": 2,
    "micro_batch": 8, "epoch": 0.5,
}  # fmt: skip
VALUES = {
    "hrm_loss": 2.25, "hrm_segment_loss{segment=\"1\"}": 3.0, "hrm_segment_loss{segment=\"2\"}": 2.0,
    "hrm_segments": 2.5, "hrm_q_halt": -4.5, "hrm_q_continue": -4.0, "hrm_residual{state=\"l\"}": 0.25,
    "hrm_residual{state=\"h\"}": 0.125, "hrm_tokens_per_second": 4000.0, "hrm_memory_bytes": 3.5e9,
    "hrm_grad_norm": 1.5, "hrm_learning_rate{part=\"core\"}": 1e-3, "hrm_learning_rate{part=\"adapters\"}": 5e-4,
    "hrm_steps_total": 7.0, "hrm_skipped_steps_total": 2.0, "hrm_micro_batch": 8.0,
}  # fmt: skip


def state_at(step, total=10, first=True):
    return TrainerState(global_step=step, max_steps=total, is_world_process_zero=first)


def begin(callback, step=0, **state):
    callback.on_train_begin(None, state_at(step, **state), TrainerControl())


def log(callback, step, logs, **state):
    callback.on_log(None, state_at(step, **state), TrainerControl(), logs=logs)


class Line(nn.Module):
    """y = a x + b."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).square().mean()}


@pytest.fixture
def trainer(tmp_path):
    """trainer(*callbacks, **arguments): a Trainer of 4 steps that logs each, and nothing else on the console."""

    def make(*callbacks, rows=None, **arguments):
        rows = rows or [{"x": torch.ones(1), "labels": torch.ones(1)}] * 8
        defaults = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
                    "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 2}  # fmt: skip
        options = TrainingArguments(output_dir=str(tmp_path / "trainer"), **{**defaults, **arguments})
        made = Trainer(Line(), options, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))
        made.remove_callback(PrinterCallback)
        return made

    return make


@pytest.fixture
def exporter():
    pytest.importorskip("prometheus_client", reason="the extra monitor is not installed")


@pytest.fixture
def served(exporter):
    """served(): a PrometheusCallback on a free port, closed at the end."""
    made = []

    def make(port=0, **state):
        made.append(PrometheusCallback(port))
        begin(made[-1], **state)
        return made[-1]

    yield make
    for callback in made:
        callback.close()


def scrape(url):
    with urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def samples(text):
    """Values of an exposition by name and labels."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


# ---------------------------------------------------------------------------------------------------- lines


def test_a_training_leaves_a_line_for_each_log(trainer, tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    trainer(JsonlCallback(path), eval_strategy="steps", eval_steps=2).train()
    lines = read_lines(path)
    assert [(line["event"], line["step"]) for line in lines] == [
        ("step", 1), ("step", 2), ("evaluation", 2), ("step", 3), ("step", 4), ("evaluation", 4), ("summary", 4),
    ]  # fmt: skip
    assert all({"loss", "grad_norm", "learning_rate"} <= line.keys() for line in lines if line["event"] == "step")
    assert all("eval_loss" in line for line in lines if line["event"] == "evaluation")


def test_a_line_is_on_the_disk_when_it_is_logged_and_is_strict_json(tmp_path):
    callback = JsonlCallback(tmp_path / "metrics.jsonl")
    begin(callback)
    log(callback, 1, {"loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "step", "step": 1, "loss": "nan"}\n'


def test_going_on_drops_lines_that_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    callback = JsonlCallback(path)
    for step in (1, 2, 3):
        log(callback, step, {"loss": 1.0 / step})
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    begin(callback, step=2)
    log(callback, 3, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_training_is_summed_up_once_at_its_own_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for begun, ended in ((0, 4), (4, 10), (10, 10)):  # the last was over before it began
        callback = JsonlCallback(path)
        begin(callback, step=begun)
        log(callback, ended, {"train_runtime": 1.0, "begun": begun})
    assert [(line["step"], line["begun"]) for line in read_lines(path)] == [(10, 4)]


def test_other_processes_write_serve_and_draw_nothing(tmp_path, served):
    lines, screen = JsonlCallback(tmp_path / "metrics.jsonl"), io.StringIO()
    bar = ProgressCallback(Console(file=screen, force_terminal=True))
    for callback in (lines, bar):
        begin(callback, first=False)
        log(callback, 1, LOGS, first=False)
    bar.close()
    assert list(tmp_path.iterdir()) == [] and screen.getvalue() == ""
    assert served(first=False).url is None


# ---------------------------------------------------------------------------------------------------- Prometheus


def test_what_is_exposed_is_what_was_logged_with_help_and_type(served):
    callback = served()
    assert samples(scrape(callback.url)) == {}  # no zeros that nobody logged
    log(callback, 7, LOGS)
    text = scrape(callback.url)
    assert samples(text) == VALUES
    for name in {re.sub("{.*", "", name) for name in VALUES}:
        assert re.search(rf"^# HELP {name} \S.*\.$", text, re.MULTILINE), name
        assert f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n" in text


def test_an_evaluation_leaves_the_metrics_and_segments_that_no_longer_run_go(served):
    callback = served()
    log(callback, 7, LOGS)
    log(callback, 7, {"eval_loss": 1.0, "eval_segments": 1.0})
    assert samples(scrape(callback.url)) == VALUES
    log(callback, 8, {"segment_loss_1": 1.0, "loss": float("nan")})
    found = samples(scrape(callback.url))
    assert found['hrm_segment_loss{segment="1"}'] == 1.0 and 'hrm_segment_loss{segment="2"}' not in found
    assert found["hrm_loss"] != found["hrm_loss"] and found["hrm_steps_total"] == 8


def test_two_trainings_in_a_process_do_not_collide_and_only_this_host_is_served(served):
    one, two = served(), served()
    log(one, 1, {"loss": 1.0})
    log(two, 2, {"loss": 2.0})
    assert [samples(scrape(callback.url))["hrm_loss"] for callback in (one, two)] == [1, 2]
    assert one.url.startswith("http://127.0.0.1:")


def test_the_server_lives_from_the_trainer_to_the_end_of_training(trainer, exporter, caplog):
    callback = PrometheusCallback(0)
    with caplog.at_level(logging.WARNING, logger="hrm"):
        made = trainer(callback)
        url = callback.url
        assert samples(scrape(url)) == {}
        made.train()
    assert [record.getMessage() for record in caplog.records] == [f"metrics are served on {url}"]
    assert callback.url is None
    with pytest.raises(URLError):
        scrape(url)


def test_after_an_exception_close_frees_the_port(trainer, exporter):
    class Stop(JsonlCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    callback = PrometheusCallback(0)
    made = trainer(callback, Stop("unused"))
    port = int(re.search(r":(\d+)/", callback.url)[1])
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert callback.url is not None
    callback.close()
    callback.close()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_in_use_is_named(served):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port is {port}, .* at 127.0.0.1: Address already in use"):
            served(port)


def before_loading(monkeypatch, *words):
    """The UsageError that a training ends with before its backbone is looked at."""
    monkeypatch.setattr(Job, "load", lambda *arguments: pytest.fail("it was told too late"))
    with pytest.raises(UsageError) as error:
        fine_tune(load_training_settings(words), Console(quiet=True))
    return str(error.value)


def test_a_training_is_told_of_a_port_in_use_before_it_loads_anything(exporter, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert before_loading(monkeypatch, f"train.prometheus_port={port}") == (
            f"train.prometheus_port is {port}, and metrics cannot be served on it at 127.0.0.1: Address already in "
            "use; it should be a free one, or 0 for any"
        )


def test_a_training_that_cannot_load_frees_its_port(exporter, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def load(*arguments):
        assert scrape(f"http://127.0.0.1:{port}/metrics") == ""  # served from the start
        raise UsageError("no backbone")

    monkeypatch.setattr(Job, "load", load)
    with pytest.raises(UsageError, match="no backbone"):
        fine_tune(load_training_settings([f"train.prometheus_port={port}"]), Console(quiet=True))
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_training_is_told_of_integrations_that_are_missing_before_it_loads_anything(monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    message = before_loading(monkeypatch, "train.report_to=[wandb]")
    assert message.startswith("train.report_to has 'wandb', which cannot be used: ") and "pip install wandb" in message
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    assert before_loading(monkeypatch, "train.report_to=[tensorboard]") == (
        "train.report_to has 'tensorboard', which cannot be used: it needs the package tensorboard; "
        'pip install "hrm-kernels[monitor]"'
    )
    assert before_loading(monkeypatch, "train.report_to=[[wandb]]").startswith("train.report_to has ")
    message = before_loading(monkeypatch, "train.report_to=[wandbee]")
    assert message.startswith("train.report_to has 'wandbee'; it should be a list of ") and "wandb" in message


@pytest.mark.usefixtures("no_plots")
def test_tensorboard_gets_what_metrics_jsonl_has(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard, which is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": "yes"}) + "\n" for n in range(20)))
    own = [f"hrm.backbone={save_tiny_backbone(tmp_path / 'backbone')}", *TINY_CORE, f"data.path={rows}"]
    own += ["hrm.act=true", "hrm.max_segments=2", "train.steps=3", "train.batch_size=4", "eval.max_new_tokens=1"]
    own += [f"run.folder={tmp_path / 'runs'}", "train.report_to=[tensorboard]"]
    folder = fine_tune(load_training_settings(own), Console(quiet=True))
    (events,) = folder.glob("**/events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    scalars = {
        (event.step, tag.removeprefix("train/")): event.value
        for tag in found.Tags()["scalars"]
        for event in found.Scalars(tag)
    }
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["event"] in ("step", "summary")]
    assert [line["event"] for line in lines] == ["step", "step", "step", "summary"]
    told = {(line["step"], key): line[key] for line in lines for key in line.keys() - {"event", "step"}}
    assert scalars == {place: pytest.approx(value, rel=1e-6) for place, value in told.items()}  # of float32


def test_all_integrations_or_none_may_be_asked_for():
    for names in ([], ["all"], ["none"]):
        check_integrations(names)


def test_a_port_that_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="port is 70000; it should be from 0"):
        PrometheusCallback(70000)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UsageError, match=re.escape('pip install "hrm-kernels[monitor]"')):
        PrometheusCallback(0)


# ---------------------------------------------------------------------------------------------------- the dashboard


def dashboard():
    return json.loads(DASHBOARD.read_text())


def expressions(board):
    """PromQL of the panels, with the variables filled in as Grafana does."""
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [text.replace("$__rate_interval", "10s").replace('"$instance"', '"trainer"') for text in found]


def test_the_dashboard_shows_every_metric_and_no_other():
    board = dashboard()
    exported = {metric.name for metric in GAUGES} | {f"{metric.name}_total" for metric in COUNTERS}
    assert exported == {re.sub("{.*", "", name) for name in VALUES}
    assert {name for text in expressions(board) for name in re.findall(r"\bhrm_\w+", text)} == exported
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert set(re.findall(r"\bhrm_\w+", variables["instance"]["query"]["query"])) <= exported


def test_the_dashboard_can_be_imported():
    board = dashboard()
    assert board["schemaVersion"] >= 38  # Grafana 10
    assert board.get("id") is None and board["uid"] and board["title"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [(x, y) for panel in board["panels"] for x, y in places(panel["gridPos"])]
    assert len(set(cells)) == len(cells) and all(x < 24 for x, _ in cells)  # no overlaps
    for panel in board["panels"]:
        assert panel["title"] and panel["description"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def places(grid):
    return [(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])]


# ---------------------------------------------------------------------------------------------------- a real Prometheus


@pytest.fixture
def prometheus(tmp_path):
    """prometheus(url): address of a Prometheus that scrapes `url` each second, as instance "trainer"."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("needs Prometheus; no `prometheus` on PATH (Debian: apt-get install prometheus)")
    processes = []

    def start(url):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        target = {"targets": [url.split("/")[2]], "labels": {"instance": "trainer"}}
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "hrm", "static_configs": [target]}],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        command = [binary, f"--config.file={tmp_path / 'prometheus.yml'}", f"--web.listen-address={address}",
                   f"--storage.tsdb.path={tmp_path / 'data'}", "--log.level=error"]  # fmt: skip
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return f"http://{address}"

    yield start
    for process in processes:
        process.terminate()
        process.wait(timeout=20)


def query(address, text):
    """Results of a PromQL query; none while Prometheus is starting."""
    try:
        with urlopen(f"{address}/api/v1/query?{urlencode({'query': text})}", timeout=5) as answer:
            found = json.load(answer)
    except (URLError, ConnectionError):
        return []
    assert found["status"] == "success"
    return found["data"]["result"]


def wait_for(read, seconds=20):
    """What `read` returns once there is something, within a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := read():
            return found
        time.sleep(0.2)
    raise AssertionError(f"nothing came within {seconds} s")


def test_a_real_prometheus_scrapes_the_values_and_every_panel_of_the_dashboard_has_data(served, prometheus):
    callback = served()
    log(callback, 7, LOGS)
    address = prometheus(callback.url)
    for name, value in VALUES.items():
        (result,) = wait_for(lambda name=name: query(address, name))
        assert float(result["value"][1]) == value, name
        assert result["metric"]["instance"] == "trainer"
    for text in expressions(dashboard()):
        assert wait_for(lambda text=text: query(address, text)), text


# ---------------------------------------------------------------------------------------------------- the bar


def test_the_bar_shows_steps_and_the_latest_metrics():
    screen = io.StringIO()
    callback = ProgressCallback(Console(file=screen, force_terminal=True, width=160))
    begin(callback, step=2)
    callback.on_step_end(None, state_at(3), TrainerControl())
    log(callback, 3, LOGS)
    log(callback, 3, {"eval_loss": 1.0})
    callback.close()
    callback.close()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()[-1]
    assert "step 3 of 10" in last and "30%" in last
    assert last.rstrip().endswith("loss 2.250  segments 2.50  4,000 tokens/s  3.5 GB")


def test_without_a_terminal_only_the_last_state_is_printed(trainer):
    screen = io.StringIO()
    trainer(ProgressCallback(Console(file=screen, width=100))).train()
    (line,) = screen.getvalue().strip().splitlines()
    assert "step 4 of 4" in line and "\x1b" not in line and "loss" in line
