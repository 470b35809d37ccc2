"""Choose the filters and repairs of a run: those of the table that are switched on, and the user's own from files."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

from cleaning.filters.base import Filter, Step
from cleaning.filters.steps import ALWAYS, MASKS, STEPS
from cleaning.settings import FilterSettings
from fastft.data.conversation import Conversation
from fastft.data.language import available, check_codes
from fastft.errors import UserError


@functools.lru_cache(maxsize=8)
def chosen_steps(settings: FilterSettings) -> tuple[Step, ...]:
    """Return the steps that are on. The user's own filters come before the masks, so that they see the text as it is."""
    on = [s for s in STEPS if s.name not in settings.without_filters and (s.default or s.name in settings.with_filters)]
    first_mask = next((i for i, step in enumerate(on) if step.name in MASKS), len(on))
    return (*on[:first_mask], *(_own_filter(spec) for spec in settings.own_filters), *on[first_mask:])


def check(settings: FilterSettings) -> None:
    """Raise UserError for settings that cannot be used, before any work is done."""
    names = {step.name for step in STEPS}
    for name in (*settings.with_filters, *settings.without_filters):
        if name not in names:
            raise UserError(f"no filter is called {name!r}; --list_filters shows them")
    for name in settings.without_filters:
        if name in ALWAYS:
            raise UserError(f"{name} cannot be switched off: what it rejects cannot be trained on")
    if both := set(settings.with_filters) & set(settings.without_filters):
        raise UserError(f"{min(both)} is both switched on and off")
    if settings.consecutive not in ("merge", "last"):
        raise UserError(f"--consecutive is {settings.consecutive!r}; it must be merge or last")
    for option in ("min_turns", "max_turns", "max_chars"):
        value = getattr(settings, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; it must be at least 1")
    needs_language = settings.languages or "unknown_language" in settings.with_filters
    if needs_language and not available():
        raise UserError("--languages needs pycld2, which has no wheel for this platform: pip install pycld2")
    check_codes(settings.languages)
    if settings.moderation:
        from cleaning.filters import moderation

        moderation.check_url(settings.moderation)
    own = [_own_filter(spec).name for spec in settings.own_filters]
    for name in own:
        if name in names or own.count(name) > 1:
            raise UserError(f"--filters: there are two filters called {name!r}")


@functools.cache
def _own_filter(spec: str) -> Filter:
    """Load a user's filter, given as `my.py:too_polite`. This runs the file. Raises UserError if it fails."""
    path, _, name = spec.rpartition(":")
    if not path or not name.isidentifier():
        raise UserError(f"--filters {spec}: expected FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise UserError(f"--filters {spec}: {path}: no such file")
    module_spec = importlib.util.spec_from_file_location(f"own_filters_{Path(path).stem}", path)
    if module_spec is None:
        raise UserError(f"--filters {spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001  it is the user's code
        raise UserError(f"--filters {spec}: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--filters {spec}: {path} has no function {name}")
    description = (function.__doc__ or "a filter of your own").strip().split("\n")[0]
    return Filter(name, functools.partial(_ask_own, spec, function), description)


def _ask_own(spec: str, function: Callable, conversation: Conversation, settings: FilterSettings) -> str | None:
    """Return the complaint of a user's filter. Raises UserError if the filter fails, which says nothing about the data."""
    try:
        answer = function(conversation)
    except Exception as error:  # noqa: BLE001  it is the user's code
        raise UserError(f"--filters {spec}: {type(error).__name__} at {conversation.id}: {error}") from None
    if answer is not None and not isinstance(answer, str):
        raise UserError(
            f"--filters {spec}: returned {type(answer).__name__}; it must return a text that says what is wrong, or None"
        )
    return answer


def described_filters(settings: FilterSettings) -> list[str]:
    """Return the lines of `--list_filters`: plain text, for people and for `grep`."""
    own = [_own_filter(spec) for spec in settings.own_filters]
    rows = [("name", "default", "rejects", "what it finds or changes")]
    for step in (*STEPS, *own):
        default = "always" if step.name in ALWAYS else "on" if step.default else "off"
        rows.append((step.name, step.option or default, step.drops, step.description))
    rows.append(("moderation", "--moderation", "conversation", "the endpoint flags a turn"))
    widths = [max(map(len, column)) for column in zip(*rows)][:3]
    table = ["  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[3]]) for row in rows]
    return ["Filters and repairs, in the order in which they are applied", *table]
