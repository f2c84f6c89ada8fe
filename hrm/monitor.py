"""What one watches of a training: callbacks of the Trainer that write lines, serve Prometheus, or draw a bar.

Each takes the logs of a step (`loss`, `segments`, `residual_l`, ...), shows the keys that are there, and does nothing
in processes other than the first.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hrm.data import first_line
from hrm.running import progress_bar
from hrm.runs import append_line, forget_after, read_lines
from hrm.settings import UsageError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

logger = logging.getLogger("hrm")

# ---------------------------------------------------------------------------------------------------- lines


class JsonlCallback(TrainerCallback):
    """Adds each log to `path` as one line, on the disk as soon as it is logged.

    A line is {"event": "step", "step": n, ...}; event is "evaluation" where keys begin with eval_, and "summary" for
    the totals that the Trainer logs at the end. Training that starts or goes on at step n drops lines of later steps,
    and the summary of an end that it was not; one that is over gets no second summary.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._summed_up = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            over = state.global_step >= state.max_steps
            forget_after(self.path, state.global_step, () if over else ("summary",))
            self._summed_up = any(line.get("event") == "summary" for line in read_lines(self.path))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and not (self._summed_up and _event(logs) == "summary"):
            append_line(self.path, {"event": _event(logs), "step": state.global_step, **logs})


def _event(logs: Mapping[str, float]) -> str:
    if any(key.startswith("eval_") for key in logs):
        return "evaluation"
    return "summary" if "train_runtime" in logs else "step"


# ---------------------------------------------------------------------------------------------------- Prometheus


class Exported(NamedTuple):
    """A metric: its value is a log's under the keys that match."""

    name: str
    text: str  # what it is, with its unit
    keys: Mapping[str, str]  # pattern of keys: value of the label, which may name the pattern's group
    label: str = ""
    scale: float = 1.0


GAUGES = (
    Exported("hrm_loss", "Training loss, mean of the steps since the last log, nats.", {"loss": ""}),
    Exported("hrm_segment_loss", "Loss after each segment, nats a token.", {r"segment_loss_(\d+)": r"\1"}, "segment"),
    Exported("hrm_segments", "Segments that a row ran, mean.", {"segments": ""}),
    Exported("hrm_q_halt", "Q value of halting, mean over the rows.", {"q_halt": ""}),
    Exported("hrm_q_continue", "Q value of going on, mean over the rows.", {"q_continue": ""}),
    Exported(
        "hrm_residual",
        "Relative change of a state in the last segment, ratio.",
        {"residual_l": "l", "residual_h": "h"},
        "state",
    ),
    Exported("hrm_tokens_per_second", "Tokens trained on, per second.", {"tokens_per_second": ""}),
    Exported(
        "hrm_memory_bytes",
        "Most memory in use, of the GPU since the last log or of a process without one so far, bytes.",
        {"memory_gb": ""},
        scale=1e9,
    ),
    Exported("hrm_grad_norm", "Norm of the gradient before it is clipped.", {"grad_norm": ""}),
    Exported(
        "hrm_learning_rate",
        "Learning rate of a part of the model, per step.",
        {"learning_rate": "core", "adapter_lr": "adapters"},
        "part",
    ),
    Exported("hrm_micro_batch", "Rows that go through the model together, count.", {"micro_batch": ""}),
)
COUNTERS = (  # exposed with _total behind their names
    Exported("hrm_steps", "Optimizer steps so far, count.", {"step": ""}),
    Exported("hrm_skipped_steps", "Steps left out since their gradient was not finite, count.", {"skipped_steps": ""}),
)


class PrometheusCallback(TrainerCallback):
    """Serves the latest log as Prometheus metrics on http://host:port/metrics while the Trainer lives.

    A metric is there once it has been logged. The server stops at the end of training; whoever trains calls `close`
    where training raises.

    Args:
        port: from 0 to 65535; 0 takes a free one, which is logged once and part of `url`.
        host: address to listen on; anyone who reaches it can read the metrics.
        name: what error messages call the port.

    Raises:
        UsageError: `port` makes no sense, or prometheus-client is not installed; where serving starts, with `serve` or
            the Trainer: the address cannot be listened on.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", *, name: str = "port") -> None:
        if not 0 <= port <= 65535:
            raise UsageError(f"{name} is {port}; it should be from 0 (any free one) to 65535")
        try:
            import prometheus_client  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"{name} is {port}, and serving metrics needs the package prometheus-client; "
                'pip install "hrm-kernels[monitor]"'
            ) from error
        self.port, self.host, self._name = port, host, name
        self.url: str | None = None
        """Where the metrics are served; None: they are not."""
        self._server: Any = None
        self._values: dict[str, dict[str, float]] = {}  # of each metric: its label's values and theirs

    def on_init_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.on_train_begin(args, state, control)  # a port in use is known at once

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.serve()

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = {**kwargs["logs"], "step": state.global_step}
        for exported in (*GAUGES, *COUNTERS):
            if found := _values(exported, logs):
                self._values[exported.name] = found

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()

    def collect(self) -> Iterator[Metric]:
        """What is exposed now: called by the server at each scrape, in a thread of its own."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for family, group in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for exported in group:
                if found := self._values.get(exported.name):
                    metric = family(exported.name, exported.text, labels=[exported.label] if exported.label else [])
                    for label, value in found.items():
                        metric.add_metric([label] if exported.label else [], value)
                    yield metric

    def close(self) -> None:
        """Stops serving; the port is free when this returns. May be called again."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = self.url = None

    def serve(self) -> None:
        """Starts serving, unless it has begun; a Trainer does so too, but it may be minutes until there is one."""
        if self._server is not None:
            return
        from prometheus_client import CollectorRegistry, start_http_server

        self._values.clear()  # of an earlier training
        registry = CollectorRegistry()  # not the process's own: trainings do not meet in it
        registry.register(self)
        try:
            self._server = start_http_server(self.port, addr=self.host, registry=registry)
        except OSError as error:
            raise UsageError(
                f"{self._name} is {self.port}, and metrics cannot be served on it at {self.host}: {error.strerror}; "
                "it should be a free one, or 0 for any"
            ) from error
        self.url = f"http://{self.host}:{self._server[0].server_port}/metrics"
        if self.port == 0:
            logger.warning("metrics are served on %s", self.url)  # a warning is shown: nothing else tells the port


def _values(exported: Exported, logs: Mapping[str, float]) -> dict[str, float]:
    """Values of a metric in `logs` by its label's value."""
    return {
        match.expand(label): exported.scale * float(value)
        for pattern, label in exported.keys.items()
        for key, value in logs.items()
        if (match := re.fullmatch(pattern, key))
    }


# ---------------------------------------------------------------------------------------------------- integrations


# transformers names another way
NEEDED = {"tensorboard": 'it needs the package tensorboard; pip install "hrm-kernels[monitor]"'}


def check_integrations(names: Sequence[str]) -> None:
    """Makes each of the Trainer's integrations once, which costs no more than importing its package.

    Raises:
        UsageError: transformers has no such integration, or its package is not installed; train.report_to is named.
    """
    if list(names) in (["all"], ["none"]):
        return
    for name in map(str, names):
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UsageError(f"train.report_to has {name!r}; it should be a list of {known}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            reason = NEEDED.get(name, first_line(error))
            raise UsageError(f"train.report_to has {name!r}, which cannot be used: {reason}") from error


# ---------------------------------------------------------------------------------------------------- progress bar


SHOWN = {
    "loss": "loss {:.3f}",
    "segments": "segments {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory_gb": "{:.1f} GB",
}


class ProgressCallback(TrainerCallback):
    """Draws a bar on `console`: steps done, time left and the latest metrics; on a console that is no terminal, only
    its last state. Whoever trains calls `close` where training raises."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: tuple[Progress, TaskID] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()
        if not state.is_world_process_zero:
            return
        progress = progress_bar(self.console)
        task = progress.add_task(_steps(state), total=state.max_steps, completed=state.global_step, text="")
        progress.start()
        self._bar = progress, task

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._update(completed=state.global_step, description=_steps(state))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        shown = [form.format(float(logs[key])) for key, form in SHOWN.items() if key in logs]
        if shown:
            self._update(text="  ".join(shown))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it stands. May be called again."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _update(self, **fields: Any) -> None:
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, **fields)


def _steps(state: TrainerState) -> str:
    return f"Training, step {state.global_step} of {state.max_steps}"
