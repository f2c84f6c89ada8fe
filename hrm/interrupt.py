"""What Ctrl-C and SIGTERM do while the command line starts; importing this takes no time.

KeyboardInterrupt is not enough there: of an exception in the middle of their imports, libraries such as numpy make
another one, which says nothing of Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import NoReturn

STOPPED = 130  # exit status


def leave_on_interrupt() -> None:
    """From now on a signal ends the process at once, with one line and status 130; one that is ignored stays so."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == usual:
            signal.signal(number, _leave)


def raise_on_interrupt() -> None:
    """From now on a signal raises KeyboardInterrupt: there is work that may have to be put away."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) == _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is the user's


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"hrm: stopped\n")
    os._exit(STOPPED)
