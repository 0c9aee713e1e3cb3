"""Grids of cases of which the default run takes some and ``make test-slow`` the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def grid(cases: Iterable[Any], fast: Callable[..., bool]) -> list[Any]:
    """The cases, tuples or single values; those for which ``fast`` is false of their values are marked slow."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if fast(*case) else pytest.mark.slow) for case in values]
