"""Reads the command line and the files of options before jsonargparse does.

jsonargparse converts values to their types. This module handles the names: it rewrites the command into one form that argparse
cannot misread, lets old names work, and composes the error messages about unknown keys and wrong values.
"""

import contextlib
import copy
import difflib
import json
import logging
import math
import types
import typing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from fastft.errors import UsageError

logger = logging.getLogger(__name__)

TRUTH_VALUES = ("true", "false", "yes", "no")
ADDED = ("help", "print_config")  # options that jsonargparse adds
NOTHING = object()


@dataclass(frozen=True)
class Option:
    """An option of the command line and of option files."""

    key: str
    """Its one name, with dots and underscores: the key in a file, and what follows the two dashes."""
    annotation: Any
    short: str | None = None
    positional: bool = False
    """Whether it is also positional: given by its place, without its name."""
    several: bool = False
    """Whether it takes any number of values."""
    repeated: bool = False
    """Whether the option must be repeated before each of these values."""
    separator: str | None = None
    """The character that separates values in one word."""
    alone: bool = False
    """Whether it may be given without a value."""
    required: bool = False

    @property
    def item(self) -> Any:
        """The type of one value on the command line."""
        return typing.get_args(self.annotation)[0] if self.several else self.annotation


def options_of(cls: type, prefix: str = "") -> Iterator[Option]:
    """Yield an option for every key of `cls`. A group (a dataclass inside it) yields those of its keys, then its own."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        if nested := group_of(hints[f.name]):
            yield from options_of(nested, f"{prefix}{f.name}.")
        more = f.metadata
        yield Option(
            key=prefix + key_of(f),
            annotation=hints[f.name],
            short=(more.get("short") or "").lstrip("-") or None,
            positional=more.get("positional", False),
            several=more.get("several", False),
            repeated=more.get("repeated", False),
            separator=more.get("separator"),
            alone=more.get("alone", MISSING) is not MISSING,
            required=_required(f),
        )


def key_of(f: Field) -> str:
    """The option's name: the field's own, or the one given to `option` where Python does not allow that for a field."""
    return _underscored(f.metadata.get("name") or f.name)


def _required(f: Field) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _underscored(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def group_of(annotation: Any) -> type | None:
    """The dataclass of a group of keys, or None if `annotation` is the type of a single value."""
    return annotation if isinstance(annotation, type) and is_dataclass(annotation) else None


def entry_of(annotation: Any) -> type | None:
    """The dataclass of a list's entries, or None if `annotation` allows no list of dataclasses."""
    for part in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(part) is list and (found := group_of(typing.get_args(part)[0])):
            return found
    return None


class CommandReader:
    """Reads one command. It remembers every value with the type that it must have, so that `explain` can find the wrong one."""

    def __init__(
        self, options: Sequence[Option], renamed: dict[str, str], synonyms: dict[str, str], warns: bool = True
    ):
        self.renamed, self.synonyms, self.warns = renamed, synonyms, warns
        self.by_key = {option.key: option for option in options}
        self.by_short = {option.short: option for option in options if option.short}
        self.positional = [option for option in options if option.positional]
        self.given: list[tuple[str, Any, Any]] = []  # (key, value, annotation)
        self.in_files: dict[str, Any] = {}  # dotted key -> value
        self.out: list[str] = []
        self.places: list[str] = []  # words without a name

    def read(self, argv: Sequence[str]) -> list[str]:
        """Return the command in the form that argparse cannot misread: the files as one, then every value as `--key=value`.

        So a value may begin with a dash, and positional values may come between options. Raises UsageError.
        """
        words = deque(argv)
        while words:
            word = words.popleft()
            if word == "--":
                self.places += words
                break
            if word.startswith("--"):
                self._read_long(word, words)
            elif self._is_option(word) and len(word) > 1:
                self._read_short(word, words)
            else:
                self.places.append(word)
        self._place()
        named = {key for key, _, _ in self.given}
        from_files = {key: value for key, value in self.in_files.items() if key not in named}
        self.given += [(key, value, self.by_key[key].annotation) for key, value in from_files.items()]
        if not any(word.partition("=")[0].lstrip("-") in ADDED for word in self.out):
            self._check_required(named | set(from_files))
        files = [f"--config={json.dumps(_nested(from_files), default=str)}"] * bool(from_files)
        return [*files, *self.out]

    def _read_long(self, word: str, words: deque[str]) -> None:
        name, equals, text = word[2:].partition("=")
        given = text if equals else None
        name, plus = _underscored(name).removesuffix("+"), "+" * name.endswith("+")
        if name in ADDED:
            self.out.append(f"--{name}{equals}{text}")
        elif name == "config":
            if given is None and not words:
                raise UsageError("config: expected a YAML file, got nothing")
            self._read_file(words.popleft() if given is None else given)
        elif any(part.isdecimal() for part in name.split(".")):
            raise UsageError(f"{name}: entries of a list have no options of their own; write them in the YAML file")
        elif (option := self.by_key.get(self._present(name))) is None:
            raise UsageError(self._unknown(name, self.by_key))
        else:
            self._take(option, given, words, plus)

    def _read_short(self, word: str, words: deque[str]) -> None:
        """`-o VALUE`, `-oVALUE` or `-o=VALUE`."""
        if word == "-h":
            self.out.append("--help")
        elif option := self.by_short.get(word[1:]):
            self._take(option, None, words)
        elif option := self.by_short.get(word[1]):
            self._take(option, word[2:].removeprefix("="), words)
        else:
            raise UsageError(f"unknown option {word!r}; --help lists all (a file of that name: ./{word})")

    def _take(self, option: Option, given: str | None, words: deque[str], plus: str = "") -> None:
        """Take the values of an option: `given`, which came with its name (`--key=value`), or the words that follow."""
        if given is not None:
            values = [given]
        elif option.several and not option.repeated:
            values = []
            while words and not self._is_option(words[0]):
                values.append(words.popleft())
        elif option.annotation is bool:
            values = [words.popleft() if words and words[0].lower() in TRUTH_VALUES else "true"]
        elif words and not self._is_option(words[0]):
            values = [words.popleft()]
        elif option.alone:
            self.out.append(f"--{option.key}")
            self.given.append((option.key, NOTHING, Any))
            return
        else:
            values = ["true"] if True in typing.get_args(option.annotation) else []
        if not values:
            hint = f"; a value that begins with a dash is written --{option.key}={words[0]}" if words else ""
            raise UsageError(f"{option.key}: expected {expected(option.item)}, got nothing{hint}")
        if option.separator:
            values = [part.strip() for value in values for part in value.split(option.separator) if part.strip()]
        for value in values:
            self._give(option, value, plus)

    def _give(self, option: Option, text: str, plus: str = "") -> None:
        """Give the option one value."""
        self._note_text(option, text)
        self.out.append(f"--{option.key}{plus}={text}")

    def _is_option(self, word: str) -> bool:
        """Whether a word is an option rather than a value. Negative numbers and a lone dash are values."""
        try:
            float(word)
        except ValueError:
            return word.startswith("-") and word != "-"
        return False

    def _note_text(self, option: Option, text: str) -> None:
        """Remember a value from the command line, and check the keys inside it."""
        import yaml

        value = None
        if group_of(option.annotation) or entry_of(option.annotation):
            with contextlib.suppress(yaml.YAMLError):
                value = _load_yaml(text)
        if group_of(option.annotation) and not isinstance(value, dict):
            raise UsageError(_misfit(option.key, text, option.annotation))
        if isinstance(value, (list, dict)):
            self._check_value(option.key, value, option.annotation)
            self.given.append((option.key, value, option.annotation))
        else:
            self.given.append((option.key, text, option.item))

    def _place(self) -> None:
        """Give the words without a name, in their order, to the positional options that were not given by name."""
        free = deque(self.places)
        for option in self.positional:
            while free and (option.several or not self.is_given(option.key)):
                self._give(option, free.popleft())
        if free:
            raise UsageError(f"{free[0]!r} is one value too many; an option is written --KEY VALUE, --help lists all")

    def _check_required(self, named: set[str]) -> None:
        missing = [option for option in self.by_key.values() if option.required and "." not in option.key]
        missing = [option for option in missing if option.key not in named]
        if missing:
            how = " ".join(option.key.upper() if option.positional else f"--{option.key} ..." for option in missing)
            raise UsageError(f"{', '.join(option.key for option in missing)}: missing; say {how}, or use --config FILE")

    def _present(self, name: str) -> str:
        """The present name of an option that had another name in the last release; any other name stays as it is."""
        if name in self.renamed and self.warns:
            logger.warning(
                "%s is called %s now; the old name stops working in the next release", name, self.renamed[name]
            )
        return self.renamed.get(name, name)

    def _read_file(self, path: str) -> None:
        """Take the values of a file of options, under the present names."""
        import yaml

        try:
            values = _load_yaml(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"config: {path}: no such file") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UsageError(f"config: {path}, line {line}: not YAML ({error.problem or error.context})") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"config: {path}: cannot be read ({' '.join(str(error).split())})") from None
        if not isinstance(values, dict):
            raise UsageError(f"config: {path}: holds no keys; write KEY: VALUE lines")
        for name, value in self._flat(values):
            key = self._present(name)
            if key not in self.by_key:
                raise UsageError(self._unknown(name, self.by_key))
            option = self.by_key[key]
            self._check_value(key, value, option.annotation)
            if option.several and not _fits(value, option.annotation):
                raise UsageError(_misfit(key, value, option.annotation))
            # The values are passed on as JSON, which has no infinity and NaN; jsonargparse reads YAML's words for them.
            no_json = isinstance(value, float) and not math.isfinite(value)
            self.in_files[key] = f".{value}".replace(".-", "-.") if no_json else value

    def _flat(self, values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield (dotted key, value) for every key of a file, and for every key of the groups in it."""
        for key, value in values.items():
            name = f"{prefix}{key}"
            option = self.by_key.get(self.renamed.get(name, name))
            if isinstance(value, dict) and (option is None or group_of(option.annotation)) and value:
                yield from self._flat(value, f"{name}.")
            else:
                yield name, value

    def _check_value(self, name: str, value: Any, annotation: Any) -> None:
        """Raise UsageError for errors that jsonargparse accepts or explains badly: a null where none is allowed, keys
        inside a value."""
        parts = typing.get_args(annotation)
        if value is None and annotation is not Any and type(None) not in parts:
            raise UsageError(_misfit(name, value, annotation))
        if group_of(annotation) and not isinstance(value, dict):
            raise UsageError(_misfit(name, value, annotation))
        entry, by_name = entry_of(annotation), typing.get_origin(annotation) is dict and group_of(parts[1])
        group = next(filter(None, map(group_of, (annotation, *parts))), None)
        if (entry and isinstance(value, list)) or (by_name and isinstance(value, dict)):
            for place, each in value.items() if isinstance(value, dict) else enumerate(value):
                self._check_value(f"{name}.{place}", each, entry or by_name)
                if absent := [f.name for f in fields(entry or by_name) if _required(f) and f.name not in each]:
                    raise UsageError(f"{name}.{place}.{absent[0]}: missing")
        elif group and isinstance(value, dict):
            hints = typing.get_type_hints(group)
            for key, each in value.items():
                if key not in hints:
                    raise UsageError(self._unknown(f"{name}.{key}", [f"{name}.{known}" for known in hints]))
                self._check_value(f"{name}.{key}", each, hints[key])

    def _unknown(self, name: str, known: Iterable[str]) -> str:
        """The message about an unknown key: it names our key for another project's, or else the nearest key."""
        known = [*known, *self.renamed]
        nearest = self.synonyms.get(name.rpartition(".")[2]) or _nearest(name, known)
        nearest = nearest or _nearest(name.partition(".")[0], known)  # of a mapping under an unknown key
        nearest = self.renamed.get(nearest, nearest)
        return f"unknown key {name!r}; " + (f"the nearest valid one is {nearest!r}" if nearest else "--help lists all")

    def is_given(self, key: str) -> bool:
        """Whether the user gave a value, on the command line or in a file."""
        return any(key == given for given, _, _ in self.given)

    def explain(self, error: Exception) -> str:
        """The message about the value of the wrong type; if all types are right, jsonargparse's own message in one line."""
        for key, value, annotation in self.given:
            if value is not NOTHING and not _fits(value, annotation):
                return _misfit(*_innermost(key, value, annotation))
        return " ".join(str(error).split())


def _load_yaml(text: str) -> Any:
    """The value of a YAML text. Dates are texts: no option has YAML's own type for them."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in those if tag != "tag:yaml.org,2002:timestamp"]
        for first, those in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml.load(text, Loader)  # noqa: S506  it is a SafeLoader


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Turn {"a.b": 1} into {"a": {"b": 1}}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return found


def _misfit(key: str, value: Any, annotation: Any) -> str:
    """The message about a value of the wrong type."""
    return f"{key}: expected {expected(annotation)}, got {'null' if value is None else repr(value)}"


def _innermost(key: str, value: Any, annotation: Any) -> tuple[str, Any, Any]:
    """The part of a value of the wrong type that is wrong: (its key, the part, the type that it must have)."""
    entry, parts = entry_of(annotation), typing.get_args(annotation)
    inside: list[tuple[str, Any, Any]] = []
    if entry and isinstance(value, list):
        inside = [(f"{key}.{number}", each, entry) for number, each in enumerate(value)]
    elif isinstance(value, dict) and typing.get_origin(annotation) is dict:
        inside = [(f"{key}.{name}", each, parts[1]) for name, each in value.items()]
    elif isinstance(value, dict) and (group := next(filter(None, map(group_of, (annotation, *parts))), None)):
        hints = typing.get_type_hints(group)
        inside = [(f"{key}.{name}", each, hints[name]) for name, each in value.items()]
    wrong = next((each for each in inside if not _fits(*each[1:])), None)
    return _innermost(*wrong) if wrong else (key, value, annotation)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether jsonargparse accepts `value` for that type."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    try:
        parser.parse_object({"value": copy.deepcopy(value)}) if not isinstance(value, str) else parser.parse_args(
            [f"--value={value}"]
        )
    except jsonargparse.ArgumentError:
        return False
    return True


def expected(annotation: Any) -> str:
    """Describe a type in words: "a whole number", "one of cosine, linear", "true or false"."""
    if group := group_of(annotation):
        return f"a group of keys ({', '.join(f.name for f in fields(group))})"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        names = [str(part) for part in parts if not isinstance(part, bool)]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(expected(part) for part in parts if part is not type(None))
    if origin is tuple:
        return f"a list of {len(parts)} values"
    if origin is list:
        return "a list" + {str: " of texts", int: " of whole numbers", float: " of numbers"}.get(parts[0], "")
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _nearest(key: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant, or None: a similar one in the same group, else one whose last part is similar."""
    names = list(names)
    group, _, last = key.rpartition(".")
    same = [name for name in names if name.rpartition(".")[0] == group] or names
    lasts = {name.rpartition(".")[2]: name for name in names}
    found = difflib.get_close_matches(key, same, n=1)
    found += [lasts[near] for near in difflib.get_close_matches(last, lasts, n=1)]
    return found[0] if found else None
