"""The command line of every verb: dataclasses declare its options, jsonargparse reads them, `run` turns errors into lines.

    @dataclass
    class InspectConfig:
        data: str = option(positional=True)
        \"\"\"A file of conversations.\"\"\"
        model: str
        count: int = option(3, short="-n")

    [config] = parse(argv, "fastft inspect", "Show which tokens are trained.", InspectConfig)

Every field is an option `--KEY` and, in a file that `--config FILE.yaml` names, the key KEY; `--print_config` prints such a file.
A positional option may also be given without its name. An attribute's docstring is its help. A dash in an option's name is read
as an underscore, and `--KEY` of a truth value means true. An unknown key, or a value of the wrong type, is a `UsageError` of
one line that names the key and the nearest valid one.
"""

import argparse
import difflib
import importlib
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, NoReturn

from fastft.common import logs
from fastft.common.command_reader import CommandReader, Option, expected, group_of, key_of, options_of
from fastft.common.files import machine_error
from fastft.errors import BUG, PeerError, UsageError, UserError

__all__ = ["BUG", "leave", "option", "parse", "run", "run_module", "subcommands"]


def run(main: Callable[[], int | None], speaks: Callable[[], bool] = lambda: True) -> int:
    """Call `main` and return the exit code of the process. This is the only place where an error becomes a line.

    What `main` raises decides what is printed on stderr, and the exit code:

    - UserError, or what the machine refuses (a full disk, a directory that is read-only): one line, "error: …"; the
      error's own code, 1 or 2
    - PeerError: nothing, because the process that met the error prints it; 1
    - KeyboardInterrupt: nothing; 130
    - BrokenPipeError because nobody reads the output any more (`| head`): nothing; 0
    - any other exception is a bug: its traceback, and a line that asks for a report; 1

    Nothing is printed if `speaks()` is false, for runs in which several processes meet the same error.
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
    except BrokenPipeError:
        return 0 if _stdout_is_closed() else _bug(speaks)
    except OSError as error:
        if (ours := machine_error(error)) is None:
            return _bug(speaks)
        line, code = str(ours), ours.exit_code
    except Exception:  # noqa: BLE001  whatever it is
        return _bug(speaks)
    if speaks():
        logs.clear_live()
        logs.write(f"error: {line}\n")
    return code


def _stdout_is_closed() -> bool:
    """Whether the program that read our standard output has ended, such as `head`; False if another pipe has broken.

    If it has, all further output is sent to /dev/null, so that Python does not fail again at the end.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll reports errors even with an empty mask
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _bug(speaks: Callable[[], bool]) -> int:
    if speaks():
        logs.clear_live()
        traceback.print_exc()
        print(f"error: {BUG}", file=sys.stderr, flush=True)
    return 1


def subcommands(argv: Sequence[str], prog: str, description: str, table: dict[str, tuple[str, str]]) -> int | None:
    """Call the `main` of the module that the first word names with the words after it, and return what it returns.

    `table`: word -> (module, what it does). The module is imported only when its word is given. `--help`, or no word at all,
    prints the table and exits. Raises UsageError for a word that is not in it.
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, table))
        words = "\n".join(f"  {word:<{width}} {what}" for word, (_, what) in table.items())
        print(f"usage: {prog} WORD ...\n\n{description}\n\n{words}\n\n{prog} WORD --help lists its options.")
        raise SystemExit(0)  # as argparse does
    if argv[0] not in table:
        nearest = difflib.get_close_matches(argv[0], table, n=1, cutoff=0.0)[0]
        raise UsageError(f"{prog}: unknown word {argv[0]!r}; did you mean {nearest!r}? ({prog} --help lists all)")
    return importlib.import_module(table[argv[0]][0]).main(list(argv[1:]))


def run_module(main: Callable[[list[str]], int | None], speaks: Callable[[], bool] = lambda: True) -> NoReturn:
    """Run `main` with this process's command line and end the process: for a module that `python -m` has started."""
    logs.show()
    leave(run(lambda: main(sys.argv[1:]), speaks))


def leave(code: int) -> NoReturn:
    """End the process at once, without Python's own clean-up.

    During that clean-up a thread of gloo may still free the tensors of the last collective. It cannot get the interpreter's
    lock any more, and aborts the process although its work is done (1 of 25 runs on 2 processes, torch 2.13, Python 3.11).
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a terminal that has been closed
            stream.flush()
    os._exit(code)


def option(
    default: Any = MISSING,
    *,
    short: str | None = None,
    name: str | None = None,
    positional: bool = False,
    several: bool = False,
    repeated: bool = False,
    separator: str | None = None,
    alone: Any = MISSING,
    help: str | None = None,
) -> Any:
    """Declare a dataclass field that is more than `--field VALUE`.

    `short`: an additional short name, such as "-o". `name`: the option's name where Python does not allow it for a field, such
    as `with`. `positional`: the option may also be given by its place, without its name. `several`: any number of values,
    separated by spaces or by repeating the option; they are texts, numbers or paths. `repeated`: any number of values, one
    each time the option is given, so that a positional value may follow. `separator`: each value is split at it
    (`--with a,b`). `alone`: the value of the option if it is given without one. `help`: replaces the attribute's docstring,
    for a text that is computed.
    """
    metadata = {
        "option": True,
        "short": short,
        "name": name,
        "positional": positional,
        "several": several or repeated,
        "repeated": repeated,
        "separator": separator,
        "alone": alone,
        "help": help,
    }
    if several or repeated:
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
    warns: bool = True,
) -> list:
    """Return one instance of each of the dataclasses `classes`. Raises UsageError with one line; `--help` exits.

    A value on the command line replaces one from a file, whatever their order, and a later file replaces an earlier one.
    `renamed` maps names that options had in the last release to their present ones: the old ones still work, with a warning if
    `warns`, which is false for a file that fastft itself wrote and nobody typed.
    `synonyms` maps names that other projects use to ours, to be named in the error about an unknown key.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    options = [each for cls in classes for each in options_of(cls)]

    class HelpFormatter(jsonargparse.DefaultHelpFormatter):
        """Describes types in --help in the same words as error messages do."""

        def _get_type_str(self, action: argparse.Action) -> str | None:
            annotation = getattr(action, "_typehint", None) or action.type
            return None if annotation is None else expected(annotation)

    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=description,
        usage=usage or _usage(prog, options),
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="a YAML file with the options below as its keys"
    )
    for cls in classes:
        _add_options(parser, cls)
    for action in parser._actions:
        if action.dest == "print_config":
            action.help = "print all options as YAML, a file for --config, and stop (=skip_default: only what is given)"
    reader = CommandReader(options, renamed or {}, synonyms or {}, warns)
    argv = reader.read(argv)
    for each in options:
        if each.several and reader.is_given(each.key):
            parser.set_defaults({each.key: []})  # argparse would append the given values to the default
    try:
        values = parser.parse_args(argv)
    except jsonargparse.ArgumentError as error:
        raise UsageError(reader.explain(error)) from None
    values = parser.instantiate(values)
    return [cls(**{f.name: values[key_of(f)] for f in fields(cls) if key_of(f) in values}) for cls in classes]


def _usage(prog: str, options: Iterable[Option]) -> str:
    """The first line of --help, with required and positional options. The list of all options follows it."""
    places = []
    for each in options:
        word = each.key.upper()
        if each.positional:
            places.append(f"[{word} ...]" if each.several else word if each.required else f"[{word}]")
        elif each.required and "." not in each.key:
            places.append(f"--{each.key} {word}")
    return " ".join([prog, *places, "[--KEY VALUE ...] [--config FILE]"])


def _add_options(parser: Any, cls: type) -> None:
    """Add the fields of `cls` to the parser: plain ones with jsonargparse's own function, fields made by `option` one by
    one."""
    made = {each.key: each for each in options_of(cls)}
    special = [f for f in fields(cls) if f.metadata.get("option")]
    texts = _attribute_docstrings(cls)
    for f in special:
        known = made[key_of(f)]
        settings: dict[str, Any] = {"type": known.item, "help": f.metadata["help"] or texts.get(f.name, "")}
        if known.several:
            settings |= {"nargs": "+", "action": "extend"}
        elif known.alone:
            settings |= {"nargs": "?", "const": f.metadata["alone"]}
        default = f.default if f.default_factory is MISSING else f.default_factory()
        settings |= {"required": True} if known.required else {"default": default}
        names = [f"-{known.short}"] * bool(known.short) + [f"--{known.key}"]
        parser.add_argument(*names, dest=known.key, **settings)
    parser.add_class_arguments(cls, skip={f.name for f in special})
    groups = {each.key for each in made.values() if group_of(each.annotation)}
    # --help lists the keys of a group, so it leaves out the option for the whole group.
    for action in parser._actions:
        if action.dest in groups or action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The docstrings of the fields, by name, with those of the classes that `cls` derives from."""
    from docstring_parser import parse_from_object

    return {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for each in reversed(cls.__mro__)
        if is_dataclass(each)
        for parameter in parse_from_object(each).params
    }
