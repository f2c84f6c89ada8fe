"""Started by test_distributed.py: one process of a launch after another, each forked off this one, which has imported
what they need. Importing it takes most of the time of a training so short.

Each line of standard input is a job in JSON: its command (a script or "-m", a module, and their words), what is set in
its environment, its working folder and the file that it speaks into. Its exit status is answered when it has ended.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys

import fsdp_worker  # noqa: F401
import matplotlib.figure  # noqa: F401
import transformers.models.gemma3.modeling_gemma3
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import hrm.cli
import hrm.report
import hrm.train


def become(command: list[str], environment: dict[str, str], folder: str, said: str) -> None:
    """Runs `command` in this process, to its end."""
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(path, flags), descriptor)
    os.dup2(1, 2)
    os.environ.update(environment)
    os.chdir(folder)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def serve() -> None:
    """Forks a process for each job; returns in none but this one."""
    for line in sys.stdin:
        if not (child := os.fork()):
            become(**json.loads(line))
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    hrm.report.plot_run = lambda *_: None  # as `no_plots` in conftest.py
    gc.freeze()  # as tests/conftest.py
    serve()
