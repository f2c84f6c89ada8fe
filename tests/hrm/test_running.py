"""What every training run needs around its loop."""

import contextlib
import signal
from types import SimpleNamespace

import pytest
import torch

from hrm.running import Interrupted, StopOnInterrupt, TrainingError, forget_peak, joined_processes, peak_memory
from hrm.settings import UsageError


@pytest.mark.parametrize("number", StopOnInterrupt.SIGNALS)
def test_a_signal_that_comes_twice_at_once_is_one(number):
    with StopOnInterrupt() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        signal.raise_signal(number)  # as `timeout` sends it: to the process and to its group
        assert stop.asked


def test_a_later_one_is_pythons_own(monkeypatch):
    with StopOnInterrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(stop, "PATIENCE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in StopOnInterrupt.SIGNALS]
    with StopOnInterrupt() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.asked
    assert [signal.getsignal(number) for number in StopOnInterrupt.SIGNALS] == before


# ---------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def group(monkeypatch):
    """joined, parted: whether processes are joined, and how often they were parted."""
    seen = SimpleNamespace(joined=False, parted=0)

    def join(**kwargs):
        seen.joined = True
        return SimpleNamespace(destroy_process_group=part, num_processes=2)

    def part():
        seen.joined, seen.parted = False, seen.parted + 1

    monkeypatch.setattr("hrm.running.PartialState", join)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: seen.joined)
    return seen


@pytest.mark.parametrize("error", [None, UsageError("x"), TrainingError("x"), Interrupted("x")])
def test_processes_that_end_alike_are_parted(group, error):
    try:
        with joined_processes():
            assert group.joined
            if error is not None:
                raise error
    except type(error) as raised:
        assert raised is error
    assert group.parted == 1


@pytest.mark.parametrize("error", [TrainingError("x", alone=True), Interrupted("x", alone=True), KeyError("x")])
def test_a_process_that_ends_alone_does_not_wait_for_the_others(group, error):
    with pytest.raises(type(error)), joined_processes():
        raise error
    assert group.parted == 0


def test_processes_that_the_caller_has_joined_stay_joined(group):
    group.joined = True
    with joined_processes():
        pass
    assert group.joined and group.parted == 0


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_ADDR": "127.0.0.1"}, True),  # --cpu --num_processes 2
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, False),  # --cpu --num_processes 1
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}, False),  # its other way
        ({"MASTER_ADDR": "127.0.0.1"}, False),
    ],
)
def test_one_process_where_several_were_asked_for_is_refused(monkeypatch, variables, refused):
    monkeypatch.setattr("hrm.running.PartialState", lambda **_: SimpleNamespace(num_processes=1))
    for name in ("ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    expected = pytest.raises(UsageError, match="has started one") if refused else contextlib.nullcontext()
    with expected, joined_processes():
        pass


# ---------------------------------------------------------------------------------------------------- memory


def test_a_gpus_peak_is_that_since_it_was_forgotten(monkeypatch):
    now, peak = 2e9, [5e9]
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: peak.__setitem__(0, now))
    device = torch.device("cuda")
    assert [peak_memory(device) for _ in range(2)] == [5, 5]
    forget_peak(device)
    assert peak_memory(device) == 2


def test_a_processs_peak_does_not_fall():
    before = peak_memory(torch.device("cpu"))
    assert 0.01 < before <= peak_memory(torch.device("cpu")) < 1000
