"""The command line of every verb: dataclasses are its options, jsonargparse its parser, and `run` its one way out.

    @dataclass
    class ChatConfig:
        model: str
        \"\"\"A model's directory.\"\"\"
        files: list[str] = option(several=True, positional=True)
        output_dir: str = option("out", short="-o")

    [config] = parse(argv, "fastft chat", "Talk to a model.", ChatConfig)

Every field is an option and, with `--config FILE.yaml`, a key of the file; `--print_config` prints such a file. An attribute's
docstring is its help. A dash in an option's name is read as an underscore, and a truth value that stands alone is true.
An unknown key, or a value of the wrong type, is a `UsageError` of one line that names the key and the nearest valid one.
"""

import argparse
import contextlib
import difflib
import errno
import json
import logging
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from fastft.errors import PeerError, UsageError, UserError

logger = logging.getLogger(__name__)

BUG = "this is a bug in fastft and not your mistake: please report it with the lines above"
# What the machine refuses, as opposed to what a program asks for by mistake: one line with the path says it all.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENOMEM}


# The way out ---------------------------------------------------------------------------------------------------------------


def run(main: Callable[[], int | None], speaks: Callable[[], bool] = lambda: True) -> int:
    """Call `main` and return the exit code of the process: the one place where an error becomes a line.

    A `UserError` is printed as one line ("error: …"), and so is a disk that is full or a directory that may not be written
    to. Anything else is a bug: its traceback is printed, and a line that asks for a report; the code is 1. Of several
    processes with the same error only those print it for which `speaks()` is true.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        line, code = str(error), error.exit_code
    except PeerError:
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on (`| head`), and only what has been done is still to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in MACHINE:
            return _bug(speaks)
        line, code = f"{error.filename or 'this machine'}: {error.strerror}", 1
    except Exception:  # noqa: BLE001  whatever it is
        return _bug(speaks)
    if speaks():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def _bug(speaks: Callable[[], bool]) -> int:
    if speaks():
        traceback.print_exc()
        print(f"error: {BUG}", file=sys.stderr, flush=True)
    return 1


def leave(code: int) -> NoReturn:
    """End the process without taking the interpreter apart.

    A worker thread of gloo may still be dropping the tensors of the last collective then; it cannot have the
    interpreter's lock any more and aborts the finished process (1 of 25 runs on 2 processes, torch 2.13, Python 3.11).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# Options -------------------------------------------------------------------------------------------------------------------


def option(
    default: Any = MISSING,
    *,
    short: str | None = None,
    name: str | None = None,
    positional: bool = False,
    several: bool = False,
    alone: Any = MISSING,
) -> Any:
    """A dataclass field that is more than `--field VALUE`.

    `short`: a short name too, such as "-o". `name`: what it is called on the command line where the field's name cannot be
    (`--with`). `positional`: the values that stand without a name. `several`: any number of values, separated by spaces or
    by giving the option again. `alone`: what the option means without a value.
    """
    metadata = {
        "option": True,
        "short": short,
        "name": name,
        "positional": positional,
        "several": several,
        "alone": alone,
    }
    if several:
        return field(default_factory=lambda: list(default) if default is not MISSING else [], metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def parse(
    argv: Sequence[str],
    prog: str,
    description: str,
    *classes: type,
    renamed: dict[str, str] | None = None,
    synonyms: dict[str, str] | None = None,
    usage: str | None = None,
) -> list:
    """One instance of each of the dataclasses `classes`. Raises UsageError with one line; `--help` exits.

    `renamed` maps keys that had another name in the last release to the present one: they work, with a warning. `synonyms`
    maps what other projects call a key to our name, for the line that an unknown key gets.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, usage=usage, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with the options below as its keys")
    options: dict[str, _Option] = {}
    for cls in classes:
        _add_options(parser, cls)
        options |= _options(cls)
    reader = _Reader(options, renamed or {}, synonyms or {})
    argv = reader.read(list(argv))
    try:
        values = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, TypeError) as error:  # the latter for a group that is null
        raise UsageError(reader.explain(error)) from None
    return [cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in classes]


def valid_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all keys of a dataclass, those of dataclasses inside it included."""
    keys, hints = [], typing.get_type_hints(cls)
    for f in fields(cls):
        nested = _group(hints[f.name])
        keys += valid_keys(nested, f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


# Inside --------------------------------------------------------------------------------------------------------------------

_OTHERS = ("help", "h", "print_config")  # what jsonargparse adds


@dataclass(frozen=True)
class _Option:
    """An option as the command line knows it: `key` is its dotted name, `annotation` the type of its value."""

    key: str
    annotation: Any


def _options(cls: type, prefix: str = "") -> Iterator[tuple[str, _Option]]:
    """(name on the command line without dashes, option) for every key of `cls`, its groups and short names too."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        made = _Option(prefix + f.name, hints[f.name])
        if nested := _group(hints[f.name]):
            yield from _options(nested, f"{prefix}{f.name}.")
        for name in (f.name, f.metadata.get("name"), f.metadata.get("short")):
            if name:
                yield prefix + name.lstrip("-"), made


def _group(annotation: Any) -> type | None:
    """The dataclass whose fields are the keys of a group, where `annotation` is one."""
    return annotation if isinstance(annotation, type) and is_dataclass(annotation) else None


def _entry(annotation: Any) -> type | None:
    """The dataclass of a list's entries, where `annotation` is or may be such a list."""
    for part in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(part) is list and (found := _group(typing.get_args(part)[0])):
            return found
    return None


def _add_options(parser: Any, cls: type) -> None:
    """Plain fields by jsonargparse itself; those made by `option` one by one, as argparse has them."""
    special = [f for f in fields(cls) if f.metadata.get("option")]
    texts, hints = _attribute_docstrings(cls), typing.get_type_hints(cls)
    for f in special:
        several, alone = f.metadata["several"], f.metadata["alone"]
        settings: dict[str, Any] = {"type": hints[f.name], "help": texts.get(f.name, "")}
        if several:
            settings |= {"type": typing.get_args(hints[f.name])[0], "nargs": "+", "action": "extend"}
        elif alone is not MISSING:
            settings |= {"nargs": "?", "const": alone}
        if f.metadata["positional"]:
            settings |= {"nargs": "*", "default": argparse.SUPPRESS} if several else {}
            parser.add_argument(f.name, **settings)
            continue
        default = f.default if f.default_factory is MISSING else f.default_factory()
        settings |= {"required": True} if default is MISSING else {"default": default}
        names = [name for name in (f.metadata["short"], f.metadata["name"] or f"--{f.name}") if name]
        parser.add_argument(*names, dest=f.name, **settings)
    parser.add_class_arguments(cls, skip={f.name for f in special})


def _attribute_docstrings(cls: type) -> dict[str, str]:
    from docstring_parser import parse_from_object

    return {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(cls).params}


class _Reader:
    """Reads what the user gave, on the command line and in files, before jsonargparse does: for names, and for what to say."""

    def __init__(self, options: dict[str, _Option], renamed: dict[str, str], synonyms: dict[str, str]):
        self.options, self.renamed, self.synonyms = options, renamed, synonyms
        self.given: list[tuple[str, Any, Any]] = []  # (key, value, annotation)

    def read(self, argv: list[str]) -> list[str]:
        """The command in jsonargparse's form: underscores, present names, truth values with a value, files as contents."""
        out = []
        for i, word in enumerate(argv):
            if word == "--":
                return out + argv[i:]
            following = argv[i + 1] if i + 1 < len(argv) else None
            if i and argv[i - 1] == "--config":
                out.append(self._contents(word))
            elif word.startswith("--config="):
                out.append(f"--config={self._contents(word.partition('=')[2])}")
            elif word.startswith("--"):
                out.append(self._option(word, following))
            else:
                if word.startswith("-") and (short := self.options.get(word[1:])):
                    self.given.append((short.key, following, short.annotation))
                out.append(word)
        return out

    def _option(self, word: str, following: str | None) -> str:
        name, equals, value = word[2:].partition("=")
        name, plus = name.replace("-", "_").removesuffix("+"), name.endswith("+")
        if name == "config" or name.split(".")[-1] in _OTHERS:
            return word
        if any(part.isdecimal() for part in name.split(".")):
            raise UsageError(f"{name}: entries of a list have no options of their own; write them in the YAML file")
        name = self._present(name)
        if (option := self.options.get(name)) is None:
            raise UsageError(self._unknown(name, list(self.options)))
        alone = following is None or following.lower() not in ("true", "false", "yes", "no")
        if option.annotation is bool and not equals and alone:
            return f"--{name}=true"
        self._look_inside(option, value if equals else following)
        return f"--{name}{'+' * plus}{equals}{value}"

    def _look_inside(self, option: _Option, value: str | None) -> None:
        """Note a value of the command line; the entries of a list one by one, for their keys."""
        import yaml

        entries = None
        if _entry(option.annotation) and value is not None and value.lstrip().startswith("["):
            with contextlib.suppress(yaml.YAMLError):
                entries = yaml.safe_load(value)
        if isinstance(entries, list):
            self._look_at({option.key: entries}, {option.key: option.annotation}, "")
        else:
            self.given.append((option.key, value, option.annotation))

    def _present(self, name: str) -> str:
        if name in self.renamed:
            logger.warning("%s is called %s now; the old name goes with the next release", name, self.renamed[name])
        return self.renamed.get(name, name)

    def _contents(self, path: str) -> str:
        """A file of options as one line of JSON, its keys known and by their present names."""
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"config: {path}: no such file") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"config: {path}: cannot be read ({' '.join(str(error).split())})") from None
        if not isinstance(values, dict):
            raise UsageError(f"config: {path}: holds no keys; write KEY: VALUE lines")
        values = {self._present(str(key)): value for key, value in values.items()}
        keys = {name: option.annotation for name, option in self.options.items() if "." not in name}
        self._look_at(values, keys, "")
        return json.dumps(values, default=str)

    def _look_at(self, values: dict[str, Any], keys: dict[str, Any], prefix: str) -> None:
        """Note every value of a file with the type that it must have. Raises UsageError for a key that does not exist."""
        for key, value in values.items():
            if key not in keys:
                raise UsageError(
                    self._unknown(f"{prefix}{key}", [prefix + name for name in keys] if prefix else list(self.options))
                )
            annotation, name = keys[key], f"{prefix}{key}"
            entry = _entry(annotation)
            group = next(filter(None, map(_group, (annotation, *typing.get_args(annotation)))), None)
            if group and isinstance(value, dict):
                self._look_at(value, typing.get_type_hints(group), f"{name}.")
            elif entry and isinstance(value, list):
                for number, each in enumerate(value):
                    if isinstance(each, dict):
                        self._look_at(each, typing.get_type_hints(entry), f"{name}.{number}.")
            else:
                self.given.append((name, value, annotation))

    def _unknown(self, name: str, known: list[str]) -> str:
        """The line for a key that does not exist: with what another project's name means here, or the nearest one."""
        meant = self.synonyms.get(name.rpartition(".")[2]) or _nearest(name, known)
        return f"unknown key {name!r}; " + (f"the nearest valid one is {meant!r}" if meant else "--help lists all")

    def explain(self, error: Exception) -> str:
        """Which of the given values does not fit its type, in one line; jsonargparse's own words where all of them do."""
        for key, value, annotation in self.given:
            if not _fits(value, annotation):
                return f"{key}: expected {_expected(annotation)}, got {value!r}"
        return " ".join(str(error).split())


def _fits(value: Any, annotation: Any) -> bool:
    """Whether jsonargparse takes `value` for a value of that type."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    try:
        parser.parse_object({"value": value}) if not isinstance(value, str) else parser.parse_args([f"--value={value}"])
    except Exception:  # noqa: BLE001  jsonargparse's, or the type's own
        return False
    return True


def _expected(annotation: Any) -> str:
    """A type in words: "a whole number", "one of cosine, linear", "true or false"."""
    if group := _group(annotation):
        return f"a group of keys ({', '.join(f.name for f in fields(group))})"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(str(part) for part in parts if not isinstance(part, bool))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(part) for part in parts if part is not type(None))
    if origin is tuple:
        return f"a list of {len(parts)} values"
    if origin is list:
        return "a list"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _nearest(key: str, names: Iterable[str]) -> str | None:
    """The name that was meant: one of the same group if one is near, else one whose last part is."""
    names = list(names)
    group, _, last = key.rpartition(".")
    same = [name for name in names if name.rpartition(".")[0] == group] or names
    lasts = {name.rpartition(".")[2]: name for name in names}
    found = difflib.get_close_matches(key, same, n=1)
    found += [lasts[near] for near in difflib.get_close_matches(last, lasts, n=1)]
    return found[0] if found else None
