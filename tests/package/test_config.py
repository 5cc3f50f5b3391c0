"""Options are checked with messages that help; an option beats what the model says, which beats the default."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from deq_compile.config import BACKWARD_TOL_DEFAULT, BACKWARD_TOL_EXACT, Config, Options

DEFAULTS = {
    "tol": 1e-4,
    "stop_mode": "rel",
    "max_iter": 40,
    "memory": 40,
    "solver": "auto",
    "anderson_memory": 8,
    "anderson_damping": 1.0,
    "relaxation": 0.8,
    "backward": "reuse",
    "backward_steps": 5,
    "backward_damping": 0.5,
    "attached": "keep",
    "backward_tol": BACKWARD_TOL_DEFAULT,
    "backward_max_iter": 40,
    "reuse": "auto",
    "recycle": "never",
    "warm_start": "never",
    "factor_dtype": None,
    "batch": "auto",
    "min_repeats": 7,
    "semantics": "loop",
    "verify": "periodic",
    "verify_tol": 1e-3,
    "loop_memory": None,
    "hooks": "take",
    "engine": "auto",
    "inner": "inductor",
    "inductor": {},
}


def test_defaults_are_those_of_the_table() -> None:
    assert Options().resolve().as_dict() == DEFAULTS
    assert set(Options().resolve().provenance.values()) == {"default"}


def test_every_option_stands_in_both_classes_and_in_the_docstring() -> None:
    names = [field.name for field in dataclasses.fields(Options)]
    assert names == list(DEFAULTS)
    assert [field.name for field in dataclasses.fields(Config)] == [*names, "provenance"]
    assert Options.__doc__ is not None
    for name in names:
        assert f"``{name}``" in Options.__doc__
    assert all(getattr(Options(), name) is None for name in names)


@pytest.mark.parametrize("options", [None, {}, {"tol": None}, Options()])
def test_nothing_set(options: Any) -> None:
    assert Options.from_options(options) == Options()


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("tolerance", "'tol'"), ("max_iters", "'max_iter'"), ("backward_iter", "'backward_max_iter'"), ("f_tol", "'tol'")],
)
def test_unknown_key_names_the_nearest_and_all_known(key: str, suggestion: str) -> None:
    with pytest.raises(ValueError) as caught:
        Options.from_options({key: 1})
    message = str(caught.value)
    assert f"unknown option {key!r}" in message
    assert f"did you mean {suggestion}?" in message
    assert all(name in message for name in DEFAULTS)


def test_unknown_key_that_resembles_nothing() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'options'.*Fix: drop `options=`"):
        Options.from_options({"options": {"tol": 1e-5}})
    with pytest.raises(ValueError, match="unknown option 'zzz'") as caught:
        Options.from_options({"zzz": 1})
    assert "did you mean" not in str(caught.value)


BAD: list[tuple[str, Any, str]] = [
    ("tol", 0, "a finite number above 0"),
    ("tol", -1e-3, "a finite number above 0"),
    ("tol", math.nan, "a finite number above 0"),
    ("tol", math.inf, "a finite number above 0"),
    ("tol", "1e-4", "a finite number above 0"),
    ("tol", True, "a finite number above 0"),
    ("stop_mode", "relative", "one of 'rel', 'abs'"),
    ("max_iter", 0, "an integer of at least 1"),
    ("max_iter", True, "an integer of at least 1"),
    ("max_iter", 40.0, "an integer of at least 1"),
    ("memory", 0, "an integer of at least 1"),
    ("solver", "newton", "one of 'broyden', 'anderson', 'picard', 'auto', 'reversible'"),
    ("backward", "implicit", "one of 'reuse', 'jfb', 'phantom', 'neumann', 'unroll', 'reversible', 'exact'"),
    ("backward_steps", 0, "an integer of at least 1"),
    ("anderson_memory", 0, "an integer of at least 1"),
    ("anderson_damping", 0.0, r"a number in \(0, 1\]"),
    ("relaxation", 1, "a number between 0 and 1"),
    ("relaxation", 0.0, "a number between 0 and 1"),
    ("backward_damping", 0.0, r"a number in \(0, 1\]"),
    ("backward_damping", 1.5, r"a number in \(0, 1\]"),
    ("attached", "drop", "one of 'keep'"),
    ("backward_tol", 0.0, "a number above 0"),
    ("backward_max_iter", -1, "an integer of at least 0"),
    ("reuse", "sometimes", "one of 'auto', 'always', 'never'"),
    ("factor_dtype", torch.int32, "a floating-point dtype"),
    ("factor_dtype", "int8", "a floating-point dtype"),
    ("factor_dtype", "nonsense", "a floating-point dtype"),
    ("batch", 1, "one of 'auto', 'rows', 'whole'"),
    ("min_repeats", 1, "an integer of at least 2"),
    ("semantics", "fixed_point", "one of 'loop', 'equilibrium'"),
    ("verify", False, "one of 'periodic', 'first', 'never'"),
    ("verify_tol", 0, "a number above 0"),
    ("engine", "graph", "one of 'auto', 'while', 'chunks', 'loop'"),
    ("hooks", "drop", "one of 'take', 'keep'"),
    ("inner", "cudagraphs", "one of 'inductor', 'aot_eager', 'eager'"),
    ("inductor", ["max_autotune"], "a dict of Inductor settings"),
    ("inductor", {1: 2}, "a dict of Inductor settings"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD)
def test_bad_value_says_option_expected_and_got(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"option '{key}'.*expected (None, or )?{expected}") as caught:
        Options.from_options({key: value})
    assert f"got {value!r} of type {type(value).__name__}" in str(caught.value)
    with pytest.raises(ValueError, match=key):  # the constructor is no way around the check
        Options(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attached", "implicit"),
    ],
)
def test_planned_value_is_refused_as_such(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"option '{key}'.*'{value}' is not implemented yet; expected one of"):
        Options.from_options({key: value})


def test_misspelt_choice_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'broyden'"):
        Options(solver="broyden1")


def test_coercion() -> None:
    options = Options.from_options({"tol": 1, "max_iter": np.int64(7), "verify_tol": np.float32(0.5)})
    assert (options.tol, options.max_iter, options.verify_tol) == (1.0, 7, 0.5)
    assert (type(options.tol), type(options.max_iter), type(options.verify_tol)) == (float, int, float)
    for spelling in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        assert Options.from_options({"factor_dtype": spelling}).factor_dtype is torch.bfloat16


def test_option_beats_model_beats_default() -> None:
    config = Options(tol=1e-6).resolve(tol=1e-2, max_iter=25, stop_mode="abs", memory=None)
    assert (config.tol, config.max_iter, config.stop_mode) == (1e-6, 25, "abs")
    assert config.memory == 25  # the default follows the cap, whoever set that
    picked = {name: config.provenance[name] for name in ("tol", "max_iter", "stop_mode", "memory", "solver")}
    assert picked == {
        "tol": "option",
        "max_iter": "model",
        "stop_mode": "model",
        "memory": "default",
        "solver": "default",
    }


def test_bad_hint_is_an_error() -> None:
    with pytest.raises(ValueError, match="bad value for hint 'tol'"):
        Options().resolve(tol=-1.0)
    with pytest.raises(ValueError, match="unknown hint 'eps'"):
        Options().resolve(eps=1e-3)


def test_exact_is_reuse_at_a_tight_tolerance() -> None:
    config = Options(backward="exact").resolve()
    assert (config.backward, config.backward_tol) == ("reuse", BACKWARD_TOL_EXACT)
    assert config.provenance["backward_tol"] == "option"
    hinted = Options().resolve(backward="exact")
    assert (hinted.backward, hinted.backward_tol) == ("reuse", BACKWARD_TOL_EXACT)
    assert hinted.provenance["backward"] == "model"
    assert Options(backward_tol=1e-3).resolve(backward="exact").backward_tol == 1e-3
    assert Options(backward="reuse").resolve(backward="exact").backward_tol == BACKWARD_TOL_DEFAULT
    assert Options(backward="exact").resolve(backward_tol=1e-1).backward_tol == BACKWARD_TOL_EXACT


def test_exact_with_another_tolerance_is_a_contradiction() -> None:
    with pytest.raises(ValueError, match=r"'backward' and 'backward_tol'.*contradict.*Fix: drop one"):
        Options(backward="exact", backward_tol=1e-2)


def test_raw_reuse() -> None:
    assert Options(backward_tol=math.inf).resolve().backward_tol == math.inf


def test_merge_lets_the_inner_options_hold() -> None:
    outer = Options(tol=1e-3, max_iter=10, inductor={"max_autotune": 1, "epilogue_fusion": 1})
    inner = Options(tol=1e-5, inductor={"epilogue_fusion": 2})
    assert outer.merge(inner) == Options(tol=1e-5, max_iter=10, inductor={"max_autotune": 1, "epilogue_fusion": 2})
    assert outer.merge(Options()) == outer
    assert Options().merge(inner) == inner
    assert outer.tol == 1e-3  # neither is changed
    assert inner.inductor == {"epilogue_fusion": 2}


def test_merge_of_exact_and_tolerance() -> None:
    exact, loose = Options(backward="exact"), Options(backward_tol=1e-1)
    assert loose.merge(exact).resolve().backward_tol == BACKWARD_TOL_EXACT
    assert exact.merge(loose).resolve().backward_tol == 1e-1


def test_config_is_a_value() -> None:
    one, same = Options(tol=1e-4).resolve(), Options().resolve()
    assert one == same  # who set a value does not matter
    assert hash(one) == hash(same)
    assert one.key() == same.key()
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.tol = 1.0  # type: ignore[misc]
    json.dumps(Options(factor_dtype=torch.bfloat16, inductor={"cpp.threads": (1, torch.float16)}).resolve().as_dict())


OTHER_VALUES: dict[str, Any] = {
    "tol": 1e-5,
    "stop_mode": "abs",
    "max_iter": 41,
    "memory": 7,
    "solver": "picard",
    "backward": "jfb",
    "anderson_memory": 7,
    "anderson_damping": 0.5,
    "relaxation": 0.5,
    "backward_steps": 6,
    "backward_damping": 0.6,
    "backward_tol": 0.5,
    "backward_max_iter": 21,
    "reuse": "never",
    "recycle": "auto",
    "warm_start": "previous",
    "factor_dtype": torch.bfloat16,
    "batch": "rows",
    "min_repeats": 6,
    "semantics": "equilibrium",
    "verify": "first",
    "verify_tol": 1e-2,
    "loop_memory": 5,
    "hooks": "keep",
    "engine": "loop",
    "inner": "eager",
    "inductor": {"max_autotune": True},
}


def test_key_depends_on_every_value() -> None:
    keys = {Options(**{name: value}).resolve().key() for name, value in OTHER_VALUES.items()}
    keys.add(Options().resolve().key())
    assert len(keys) == len(OTHER_VALUES) + 1
    assert set(OTHER_VALUES) == set(DEFAULTS) - {"attached"}  # which has one value so far


def test_default_of_inductor_is_not_shared() -> None:
    Options().resolve().inductor["x"] = 1
    assert Options().resolve().inductor == {}


def test_replace_checks_too() -> None:
    config = Options(factor_dtype="bfloat16").resolve()
    assert config.replace(max_iter=3, factor_dtype=None).max_iter == 3
    with pytest.raises(ValueError, match="'max_iter'"):
        config.replace(max_iter=0)
    with pytest.raises(ValueError, match="did you mean 'tol'"):
        config.replace(toll=1)
