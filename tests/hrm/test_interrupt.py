"""Ctrl-C while the command line starts, and what it starts without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from hrm.interrupt import leave_on_interrupt, raise_on_interrupt

SCRIPT = ("-c", "import sys; from hrm.__main__ import main; sys.exit(main())")  # what pip makes of the entry point
TRAIN = ("train", "data.task=chain_sum")


@pytest.mark.parametrize(
    ("number", "imported", "program"),
    [
        (signal.SIGINT, "omegaconf", ("-m", "hrm")),
        (signal.SIGINT, "hrm.cli", SCRIPT),
        (signal.SIGINT, "numpy", ("-m", "hrm")),  # which turns KeyboardInterrupt into something else
        (signal.SIGINT, "torch._C", ("-m", "hrm")),
        (signal.SIGINT, "torch", SCRIPT),
        (signal.SIGTERM, "torch._C", ("-m", "hrm")),
        (signal.SIGINT, "transformers", ("-m", "hrm")),
        (signal.SIGINT, "hrm.modeling", ("-m", "hrm")),
    ],
)
def test_a_signal_while_libraries_are_imported_is_one_line(
    number: signal.Signals, imported: str, program: tuple[str, ...]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HRM_MODEL_PATH"}
    command = [sys.executable, "-X", "importtime", *program, *TRAIN]  # says on standard error what has been imported
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            assert process.stderr is not None
            assert any(line.rpartition("|")[2].strip() == imported for line in process.stderr)
            process.send_signal(number)
            out, said = process.communicate(timeout=60)
        finally:
            process.kill()
    told = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out) == (130, "")
    assert told[-1].endswith("hrm: stopped") and "Traceback" not in said, said[-2000:]


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_once_a_verb_runs_a_signal_is_an_exception(handlers: None) -> None:
    leave_on_interrupt()
    raise_on_interrupt()
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_an_ignored_ctrl_c_stays_ignored(handlers: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's & leaves it
    for changed in (leave_on_interrupt, raise_on_interrupt):
        changed()
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize("words", [["--help"], ["trian"], ["train", "--help"], ["train", "train.stps=1"]])
def test_help_and_mistakes_do_not_wait_for_pytorch(words: list[str]) -> None:
    code = "import sys; from hrm.__main__ import main; status = main(); print('torch' in sys.modules, status)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"False {0 if '--help' in words else 2}"
