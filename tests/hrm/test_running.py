"""What every training run needs around its loop."""

import signal

import pytest

from hrm.running import StopOnInterrupt


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
