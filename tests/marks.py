"""Parametrizations of which the fast suite runs a few cases, and `make test-slow` all."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(cases: Iterable, fast: int | Iterable) -> list[Any]:
    """Mark cases as slow.

    Args:
        cases: Of `pytest.mark.parametrize`; a tuple holds the values of several arguments.
        fast: The cases that stay in the fast suite, or how many of the first ones.
    """
    cases = list(cases)
    chosen = range(fast) if isinstance(fast, int) else [number for number, case in enumerate(cases) if case in fast]
    return [case if number in chosen else _slow(case) for number, case in enumerate(cases)]


def _slow(case: Any) -> Any:
    if hasattr(case, 'marks'):  # of pytest.param
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
