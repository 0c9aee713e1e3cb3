"""Mistakes that are seeded in objects: a call that is left out or altered where one function makes it.

No source is read. A mistake names the callable that it changes and the function that calls it, so code that moves to
another line is no matter, and a callable that is gone is an error.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Call:
    """A call that is about to be made.

    Attributes:
        original: what is called.
        args, kwargs: with what; of a method, its object comes first.
        by: the object whose method makes the call; None for a function.
    """

    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by: Any

    def made(self) -> Any:
        """What the call gives as it is."""
        return self.original(*self.args, **self.kwargs)

    def made_with(self, changes: dict[int, Any]) -> Any:
        """What the call gives with other positional arguments, by their index."""
        return self.original(*(changes.get(index, value) for index, value in enumerate(self.args)), **self.kwargs)


def everywhere(call: Call) -> bool:
    return True


class Seeder:
    """Seeds one mistake. ``count`` is how often it was made: never, where nothing called what it changes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self.count = patch, 0

    def replace(
        self,
        owner: Any,
        name: str,
        wrong: Callable[[Call], Any],
        caller: Callable[..., Any] | None = None,
        when: Callable[[Call], bool] = everywhere,
    ) -> None:
        """Have ``wrong`` in place of ``owner.name``, where ``caller`` calls it and ``when`` holds.

        Args:
            owner: a class or a module.
            name: of its method or function.
            wrong: given the call, and gives its result.
            caller: the function or method in whose body the call stands; None is any.
            when: of the calls of ``caller``, those that are concerned.
        """
        declared = vars(owner)[name]
        original = declared.__func__ if isinstance(declared, staticmethod) else declared
        code = None if caller is None else caller.__code__

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if code is None or frame.f_code is code:
                call = Call(original, args, kwargs, None if code is None else frame.f_locals.get("self"))
                if when(call):
                    self.count += 1
                    return wrong(call)
            return original(*args, **kwargs)

        self._patch.setattr(owner, name, staticmethod(patched) if isinstance(declared, staticmethod) else patched)

    def drop(
        self,
        owner: Any,
        name: str,
        caller: Callable[..., Any] | None = None,
        when: Callable[[Call], bool] = everywhere,
    ) -> None:
        """Leave a call out."""
        self.replace(owner, name, lambda call: None, caller, when)

    def alter(
        self,
        owner: Any,
        name: str,
        changes: Callable[[Call], dict[int, Any]],
        caller: Callable[..., Any] | None = None,
        when: Callable[[Call], bool] = everywhere,
    ) -> None:
        """Make a call with other positional arguments, by their index."""
        self.replace(owner, name, lambda call: call.made_with(changes(call)), caller, when)

    def lie(self, owner: Any, name: str, at: Callable[[Any], Any], attribute: str, value: Any) -> None:
        """Run a method while an attribute of an object that it reads has another value.

        ``at`` gives that object of the method's own. An attribute that the method sets itself stays as it was set.
        """

        def wrong(call: Call) -> Any:
            target = at(call.args[0])
            before = getattr(target, attribute)
            setattr(target, attribute, value)
            try:
                return call.made()
            finally:
                if getattr(target, attribute) is value:
                    setattr(target, attribute, before)

        self.replace(owner, name, wrong)
