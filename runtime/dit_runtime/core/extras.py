"""Optional dependencies: a feature says in one line which extra it needs, before it starts to work."""

from __future__ import annotations

import importlib.util

from dit_runtime.core.errors import OutputError


def check_extra(feature: str, extra: str, *packages: str) -> None:
    """Say now that packages of an extra are not installed.

    Args:
        feature: what needs the packages, as the message begins.
        extra: the name of the extra in ``pyproject.toml``.
        packages: the packages as they are imported.

    Raises:
        OutputError: a package is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise OutputError(f"{feature} needs {' and '.join(missing)}; pip install 'dit-export[{extra}]'")
