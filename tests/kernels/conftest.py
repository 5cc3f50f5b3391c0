"""Every kernel test runs on both CPU implementations."""

from __future__ import annotations

import importlib.util

import pytest

from deq_compile.kernels import native

if importlib.util.find_spec("jaxtyping") is not None:  # part of the dev extra; a machine that is lent for its GPU may lack it
    from tests.kernels.shapes import install

    install()  # before any test of kernels binds their names


@pytest.fixture(params=["aten", "native"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "aten": the C++ kernels are hidden; "native": they are required."""
    if request.param == "aten":
        monkeypatch.setattr(native, "_load", lambda: None)
    else:
        assert native._load() is not None
    return str(request.param)
