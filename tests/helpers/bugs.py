"""Plants bugs: functions that fail as if the line that fails stood in the module itself."""

from collections.abc import Callable
from types import ModuleType
from typing import Any


def bug(module: ModuleType, fails: str = "int('not a number')") -> Callable[..., Any]:
    """A function of `module` that takes anything and evaluates the expression `fails`."""
    return eval(f"lambda *_, **__: {fails}", vars(module))
