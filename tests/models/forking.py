"""A process that has imported torch, and perhaps more of it, but nothing of ours: each line that it reads is a program, as JSON,
and runs in a fork of it. Importing torch takes a new process longer than what most tests want of one.

Threads do not fork, so nothing is imported here that starts any. A stage that imports more is a fork too, made when it is first
asked for, and is handed what it has to run.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import types
from typing import Any, TextIO

import torch  # noqa: F401

MOST_SECONDS = 300  # a program that takes longer is ended, by SIGALRM
STAGES = {
    # As after `import torch`.
    "torch": (),
    # What Dynamo imports and what does not import Dynamo: half of its time.
    "parts": ("torch.fx.experimental.symbolic_shapes", "torch.distributed.fsdp", "triton"),
    "dynamo": ("torch._dynamo.testing", "torch._dynamo.backends.debugging", "torch._inductor.compile_fx"),
}


def serve(source: TextIO, sink: TextIO, stage: str) -> dict[str, Any] | None:
    """Answer each line with how its program ended; within such a program, what was asked for."""
    for name in STAGES[stage]:
        importlib.import_module(name)
    gc.disable()  # it would copy every page that a child shares with its parent
    gc.freeze()
    stages: dict[str, tuple[TextIO, TextIO]] = {}
    for line in source:
        asked = json.loads(line)
        if asked["stage"] == stage:
            child = os.fork()
            if child == 0:
                return dict(asked)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sink, flush=True)
            continue
        if asked["stage"] not in stages:
            (to_read, to_write), (answer_read, answer_write) = os.pipe(), os.pipe()
            if os.fork() == 0:
                os.close(to_write)
                os.close(answer_read)
                return serve(os.fdopen(to_read), os.fdopen(answer_write, "w"), asked["stage"])
            os.close(to_read)
            os.close(answer_write)
            stages[asked["stage"]] = os.fdopen(answer_read), os.fdopen(to_write, "w")
        answer, question = stages[asked["stage"]]
        print(line, end="", file=question, flush=True)
        print(answer.readline(), end="", file=sink, flush=True)
    for _, question in stages.values():
        question.close()
    for answer, _ in stages.values():  # when all are closed: a later stage holds the ends of those before it
        answer.close()
        os.wait()
    return None


def run(asked: dict[str, Any]) -> None:
    """The program, as `python -c` would run it."""
    signal.alarm(MOST_SECONDS)
    gc.unfreeze()
    gc.enable()
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    for number, path in (1, asked["stdout"]), (2, asked["stderr"]):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["-c"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(asked["code"], "<string>", "exec"), vars(main))


run.__code__ = run.__code__.replace(co_stacksize=140_000)  # room for the frames above it, as for tests: see conftest.py


if __name__ == "__main__":
    sys.path[0] = ""
    found = serve(os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), "torch")
    if found is not None:
        run(found)
