"""What a first step asks of the compiler is begun beside the trace, and nothing depends on that."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deq_compile import torch_parts
from deq_compile.kernels import ahead, folder, native
from deq_compile.torch_parts import SettingOfAThread
from tests.fresh import python

PROGRAM = """
import torch
torch.compile(lambda x: x, backend="deq")
from deq_compile.kernels import ahead, native
from torch._inductor import cpu_vec_isa
started = ahead._thread is not None
ahead.wait()
print(started, cpu_vec_isa.valid_vec_isa_list.cache_info().currsize, native._load.cache_info().currsize, native.why_not() == "")
"""


@pytest.mark.skipif(SettingOfAThread is None, reason="settings are one process's on this torch: nothing is begun ahead")
@pytest.mark.skipif(ahead._models_run_elsewhere(), reason="nothing is begun where models may run elsewhere")
def test_looking_the_backend_up_begins_it() -> None:
    done = python(PROGRAM, "dynamo")
    assert done.stdout.split() == ["True", "1", "1", "True"], done.stderr


def test_a_process_may_end_before_it_is_done() -> None:
    done = python('import torch\ntorch.compile(lambda x: x, backend="deq")\nprint("end")', "dynamo")
    assert (done.returncode, done.stdout.split()) == (0, ["end"])
    assert "Error" not in done.stderr


def test_an_accelerator_is_looked_for_without_asking_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has asked CUDA itself cannot use it in its forks."""

    def asked() -> bool:
        raise AssertionError("expected nobody to ask CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    monkeypatch.setattr(torch.accelerator, "is_available", asked)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for count in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert ahead._models_run_elsewhere() == (count > 0)


class Running:
    """A thread that is at work until it is told to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.end.wait, daemon=True)
        self.thread.start()
        monkeypatch.setattr(ahead, "_thread", self.thread)
        monkeypatch.setattr(ahead, "_looked", threading.Event())
        monkeypatch.setattr(ahead, "_settings", ahead._asked_with())


def test_who_needs_it_waits_for_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(monkeypatch)
    waiting = threading.Thread(target=ahead.wait_for_look, daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    ahead._looked.set()
    waiting.join(10)
    assert not waiting.is_alive()
    assert running.thread.is_alive()
    running.end.set()
    ahead.wait()
    assert not running.thread.is_alive()


FORK = """
import os, time, torch
from torch._inductor import cpu_vec_isa
from deq_compile.kernels import ahead
ahead._look = lambda look=ahead._look: (time.sleep(4), look())[1]
torch.compile(lambda x: x, backend="deq")
from deq_compile.kernels import ahead, native
alive = ahead._thread.is_alive()
child = os.fork()
if child == 0:
    ahead.wait_for_look()
    print(alive, ahead._thread.is_alive(), native._load.cache_info().currsize, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="there are no forks")
@pytest.mark.skipif(SettingOfAThread is None or ahead._models_run_elsewhere(), reason="nothing is begun ahead")
def test_a_fork_waits_for_what_was_begun() -> None:
    """It would have the locks that the thread holds, for modules and files, and not the thread."""
    done = python(FORK, "dynamo")
    assert done.stdout.split() == ["True", "False", "1"], done.stderr


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was found is forgotten as often as this is long."""
    found: list[bool] = []
    monkeypatch.setattr(ahead, "_forget", lambda: found.append(True))
    monkeypatch.setattr(native, "load_beside", lambda: None)
    return found


def fails() -> bool:
    raise OSError("no space left")


@pytest.mark.parametrize("look", [fails, lambda: False])
def test_a_look_that_fails_or_misses_something_is_left_to_inductor(
    look: Callable[[], bool], forgotten: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "_looked", threading.Event())
    monkeypatch.setattr(ahead, "_look", look)
    ahead._work()
    assert ahead._looked.is_set()
    assert forgotten == [True]


def test_a_program_that_is_interrupted_is_not_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, known, valid, whole in (
        (["avx2", "fma"], ["avx2", "amx_tile"], ["avx2"], True),
        (["avx2", "fma"], ["avx2", "fma"], ["avx2"], False),
        ([], ["asimd"], ["asimd"], True),
        ([], ["asimd"], [], False),
    ):
        monkeypatch.setattr(torch_parts, "flags_of_cpu", lambda flags=flags: flags, raising=False)
        monkeypatch.setattr(torch_parts, "known_isas", known, raising=False)
        monkeypatch.setattr(torch_parts, "valid_isas", lambda valid=valid: valid, raising=False)
        assert ahead._look() == whole


def test_forgetting_lets_inductor_look_again() -> None:
    from torch._inductor import cpu_vec_isa

    before = cpu_vec_isa.valid_vec_isa_list()
    ahead._forget()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0
    assert [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()] == [str(isa) for isa in before]


def test_what_was_found_under_other_settings_is_forgotten(forgotten: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(monkeypatch)
    running.end.set()
    for settings, times in ((ahead._asked_with(), 0), (("another folder",), 1), ((), 1)):
        monkeypatch.setattr(ahead, "_settings", settings)
        ahead.wait_for_look()
        assert (ahead._settings, len(forgotten)) == ((), times)


SETTING = """
import torch
import torch._inductor.config as config
config.cpp.vec_isa_ok = False
torch.compile(lambda x: x, backend="deq")
from deq_compile.kernels import ahead
ahead.wait()
from torch._inductor import cpu_vec_isa
print(bool(cpu_vec_isa.pick_vec_isa()))
"""


def test_the_users_settings_hold_in_the_thread() -> None:
    done = python(SETTING, "dynamo")
    assert done.stdout.split() == ["False"], done.stderr


def test_nothing_is_begun_where_models_may_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_thread", None)
    monkeypatch.setattr(ahead, "_models_run_elsewhere", lambda: True)
    ahead.begin()
    assert ahead._thread is None


def test_kernels_are_not_begun_where_inductors_folder_would_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bool] = []
    monkeypatch.setattr(native, "_load", lambda: {len(loaded): loaded.append(True)})  # type: ignore[func-returns-value]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv(folder.VARIABLE, str(tmp_path / "own"))
    native.load_beside()
    assert loaded == []
    monkeypatch.setenv(folder.VARIABLE, str(tmp_path / "inductor"))
    native.load_beside()
    assert loaded == [True]
    with folder.inductor_writes_to(tmp_path / "inductor"):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
