"""Every kernel test runs on both CPU implementations."""

from __future__ import annotations

import pytest

from deq_compile.kernels import native


@pytest.fixture(params=["aten", "native"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "aten": the C++ kernels are hidden; "native": they are required."""
    if request.param == "aten":
        monkeypatch.setattr(native, "_load", lambda: None)
    else:
        assert native._load() is not None
    return str(request.param)
