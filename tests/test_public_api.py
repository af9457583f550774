"""The promise to users: names, signatures and docstrings of ``import tdc``."""

from __future__ import annotations

import inspect

import pytest

import tdc
from tdc import errors

FUNCTIONS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    # name: (parameters that may be given by position, some that must be given by name)
    "calibrate": (("model", "batches"), set()),
    "plan": (("model", "example_inputs"), {"budget", "statistics"}),
    "heal": (("small", "model", "batches"), {"config", "progress"}),
    "pareto": (("model", "example_inputs"), {"budgets", "statistics"}),
    "paths": (("plan",), {"target"}),
    "compress": (
        ("model", "example_inputs"),
        {
            "allow",
            "budget",
            "calibration",
            "exclude",
            "inplace",
            "metric",
            "plan",
            "progress",
            "seed",
            "statistics",
            "target",
        },
    ),
    "report": (("small",), set()),
    "densify": (("small",), set()),
    "save": (("small", "path"), set()),
    "load": (("path", "model"), set()),
    "compress_onnx": (("source", "destination"), set()),
    "compress_export": (("program",), {"budget", "calibration", "plan", "statistics"}),
    "wait": (("compiled",), {"timeout"}),
    "refresh": (("compiled",), set()),
}
CLASSES = {"Front", "Heal", "Plan", "Report", "Statistics"}
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


def test_all_lists_the_functions_the_values_and_every_error() -> None:
    assert set(tdc.__all__) >= {*FUNCTIONS, *CLASSES, *ERRORS}
    assert len(tdc.__all__) == len(set(tdc.__all__))


def test_every_listed_name_exists_and_no_other_is_public() -> None:
    missing = [name for name in tdc.__all__ if not hasattr(tdc, name)]
    unlisted = [
        name
        for name, value in vars(tdc).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and name not in tdc.__all__
        and name != "annotations"
    ]
    assert (missing, unlisted) == ([], [])


def test_every_error_derives_from_one_class_and_has_an_exit_code() -> None:
    for name in ERRORS:
        error = getattr(tdc, name)
        assert issubclass(error, errors.TdcError), name
        assert error.exit_code > 0, name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_the_first_parameters_may_be_given_by_position(name: str) -> None:
    positional, named = FUNCTIONS[name]
    parameters = inspect.signature(getattr(tdc, name)).parameters.values()
    by_position = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    by_name = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert by_position == positional
    assert by_name >= named
    assert len(by_position) + len(by_name) == len(parameters), "no *args, no **kwargs: a wrong name must be an error"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_and_result_has_a_type(name: str) -> None:
    signature = inspect.signature(getattr(tdc, name))
    untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert untyped == []
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_docstring_says_what_is_raised(name: str) -> None:
    docstring = inspect.getdoc(getattr(tdc, name)) or ""
    assert "Raises" in docstring
    assert any(error in docstring for error in ERRORS), "the docstring names no error class of tdc"
