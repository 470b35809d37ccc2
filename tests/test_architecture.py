"""The house holds: rooms import only rooms before them, nothing imports in a circle, and nothing heavy comes at start-up.

The order and the rooms are docs/architecture.md's. Imports are read from the syntax tree, those inside functions and those
for type checkers included: what a type needs, a reader needs, too.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastft", "cleaning")
ORDER = (
    "errors", "common", "config", "data", "model", "cost", "train", "inference", "judge",
    "compose", "serve", "distill", "cleaning", "demo", "cli",
)  # fmt: skip
BEFORE_CLEANING = {"errors", "common", "data"}
AT_THE_TOP = {"__init__.py", "__main__.py", "cli.py", "config.py", "errors.py"}


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every module of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield node.lineno, name if name in modules() else name.rpartition(".")[0] or name


def room(module: str) -> str:
    """The room that a module is in; the package `fastft` itself has a version and nothing else, and belongs to none."""
    package, *inside = module.split(".")
    return "cleaning" if package == "cleaning" else inside[0] if inside else ""


def arrows() -> Iterator[tuple[str, str, str]]:
    """(module, module that it imports, "file:line")."""
    for module, path in modules().items():
        for line, target in imported(path):
            yield module, target, f"{path.relative_to(ROOT)}:{line}"


def named(path: Path) -> Iterator[str]:
    """Modules of ours that a file names in a string, such as those that worker processes begin with."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and "." in node.value
            and node.value in modules()
        ):
            yield node.value


def test_every_room_has_its_place_in_the_order():
    rooms = {room(module) for module in modules()} - {"", "__main__"}
    assert rooms <= set(ORDER), f"not in the order of docs/architecture.md: {sorted(rooms - set(ORDER))}"
    at_the_top = {path.name for path in (ROOT / "fastft").glob("*.py")}
    assert at_the_top <= AT_THE_TOP, f"belongs into a room: {sorted(at_the_top - AT_THE_TOP)}"


def test_rooms_import_rooms_before_them():
    against = []
    for module, target, where in arrows():
        a, b = room(module), room(target)
        if a in ("", "__main__") or b in ("", a):
            continue
        if a == "cleaning":
            allowed = b in BEFORE_CLEANING
        else:
            allowed = ORDER.index(b) < ORDER.index(a)
        if not allowed:
            against.append(f"{where}: {module} imports {target}")
    assert not against, "\n".join(against)


def test_no_module_imports_in_a_circle():
    """A name in a string counts as an import: whoever loads a module by its name depends on it just as much."""
    graph: dict[str, set[str]] = {}
    by_name = ((module, target) for module, path in modules().items() for target in named(path))
    for module, target in (*((module, target) for module, target, _ in arrows()), *by_name):
        if target != module:
            graph.setdefault(module, set()).add(target)
    done: set[str] = set()

    def follow(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph.get(module, ())):
                follow(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        follow(module, [])


@pytest.mark.parametrize(
    "statement", ["import fastft", "import cleaning", "from fastft.cli import main; main(['--help'])"]
)
def test_starting_imports_nothing_heavy(statement):
    """What takes the time is counted, not the time: modules, none of them of another package."""
    heavy = "torch", "numpy", "transformers", "rich", "jsonargparse", "orjson", "jinja2", "yaml", "pyarrow"
    code = f"import sys; {statement}; print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "[]"


def test_no_class_name_stands_for_two_things():
    """Private classes count, and those inside functions: whoever searches for a name finds all of them."""
    places: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(module)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, twice


def test_a_package_is_a_door_and_holds_no_code():
    """What stands in an `__init__.py` has no name that a newcomer could look for: documentation, imports and dunders only."""
    code = []
    for path in (path for path in modules().values() if path.name == "__init__.py"):
        for node in ast.parse(path.read_text()).body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_lazy = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
            is_dunder = isinstance(node, ast.Assign) and all(t.id.startswith("__") for t in node.targets)
            if not (is_text or is_lazy or is_dunder or isinstance(node, (ast.Import, ast.ImportFrom))):
                code.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not code, "\n".join(code)


def test_no_comment_is_stranded_behind_a_bracket():
    """The formatter moves a comment that makes its line too long behind the closing bracket, away from what it speaks of."""
    stranded = []
    for path in modules().values():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.match(r"\s*[\])}]+(?:[:,]| as \w+:| = \S+)*  # (?!fmt:|noqa)", line):
                stranded.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not stranded, "\n".join(stranded)
