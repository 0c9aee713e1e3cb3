"""How the tests themselves lie: each module stands alone, and what several use is in ``support``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions too, without what it takes from the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_is_imported(path: Path) -> None:
    """A helper in a test module ties modules together: it belongs in ``support``."""
    parts = [part for name in imports_of(path) for part in name.split(".")]
    assert not [part for part in parts if part.startswith("test_")]
    assert "conftest" not in parts
