"""TODO docstring of cleaning.settings."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Settings:
    """What the user chose, for all filters. Hashable and picklable: workers get a copy."""

    with_filters: tuple[str, ...] = ()  # names that are off by default, switched on
    without_filters: tuple[str, ...] = ()  # names that are on by default, switched off
    own_filters: tuple[str, ...] = ()  # "my.py:too_polite"
    blocked_phrases: tuple[str, ...] = ()
    consecutive: str = "merge"  # answers in a row: "merge" them, or keep the "last"
    languages: tuple[str, ...] = ()  # ISO 639-1 codes, empty: all
    models: tuple[str, ...] = ()  # patterns as in file names, empty: all
    min_turns: int | None = None
    max_turns: int | None = None
    max_chars: int | None = None
    moderation: str | None = None  # URL of an OpenAI-compatible endpoint
    moderation_model: str | None = None
    moderation_cache: str | None = None  # a file; without it nothing is remembered

    def chosen(self) -> dict:
        """What differs from the defaults, for report.json; lists instead of tuples, as JSON has them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        defaults = {each.name: each.default for each in fields(self)}
        changed = {name: value for name, value in values.items() if value != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
