"""Prove from its source that a chat template puts the texts of messages into its output as they are, or trimmed.

    leaves_texts_alone(source)    # True: what the template writes around texts depends on roles and positions alone

If that is proven, one rendering with placeholders for the texts determines every other rendering of the same roles. This
saves a rendering for each conversation (4 % of a cleaning run). The proof follows messages and their texts through the
Jinja syntax tree. A text may be concatenated, trimmed, assigned to a name, chosen by a condition that does not look at it,
and output. If anything else is done with a text (a comparison, another filter, a call, a loop over it), nothing is proven,
and the template is rendered for each conversation. The same goes for an expression that is not known to give a plain string
that is the same each time. (An example is `('<s>' | safe)`: a text that is added to it by `+` is escaped.)
"""

from collections.abc import Iterable
from enum import Enum

from jinja2 import Environment, TemplateSyntaxError, nodes

_ABOUT_LOOPS = {"first", "last", "index", "index0", "revindex", "revindex0", "length"}  # `loop.previtem` is a message
# Filters and calls that are known to give plain strings, numbers and truth values.
_PLAIN_FILTERS = {"trim", "length", "upper", "lower", "capitalize", "title"}
_PLAIN_CALLS = {"raise_exception", "namespace", "range"}
_PLAIN_IF_ITS_PARTS_ARE = (
    nodes.TemplateData, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Slice,
    nodes.BinExpr, nodes.UnaryExpr, nodes.Compare, nodes.Operand, nodes.Test,
    nodes.Assign, nodes.NSRef, nodes.Break, nodes.Continue,
)  # fmt: skip


class _Is(Enum):
    """The parts of a conversation that the value of an expression may contain."""

    PLAIN = "nothing but roles, and the template's own strings"
    TEXT = "texts of messages, among other text"
    MESSAGE = "a message"
    MESSAGES = "a list of messages"
    LOOP = "Jinja's `loop`"


class _Unproven(Exception):  # noqa: N818  an outcome, not an error
    """The template contains something that is not known to leave texts alone."""


def leaves_texts_alone(source: str) -> bool:
    """Return True if it is proven; False if it is not, or if Jinja cannot parse the template."""
    try:
        body = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source).body  # noqa: S701  nothing is rendered
    except (TemplateSyntaxError, RecursionError, ValueError):
        # A tag that only transformers knows, an expression that is too deep, and a number that is too long for Python to read.
        return False
    reader = _Reader()
    try:
        # Read again until nothing new is learned, because a loop may use a name before the line that assigns it.
        while reader.learned:
            reader.learned = False
            reader.read(body)
    except (_Unproven, RecursionError):  # the latter for an expression that is too deep to follow
        return False
    return True


class _Reader:
    """Reads the statements of a template and learns what its names may hold. Raises _Unproven."""

    def __init__(self):
        # The kind of value of each name. A name that is missing here is plain.
        self.names = {"messages": _Is.MESSAGES, "loop": _Is.LOOP}
        self.learned = True

    def read(self, statements: Iterable[nodes.Node]) -> None:
        """Follow statements in order, also those inside of conditions and loops."""
        for node in statements:
            match node:
                case nodes.Output():
                    self._all(node.nodes, _Is.TEXT)
                case nodes.Assign(target=nodes.Name()):
                    self._name(node.target.name, self.kind(node.node))
                case nodes.If():
                    self._all([node.test], _Is.MESSAGES)  # a condition may ask whether there are any messages
                    self.read([*node.body, *node.elif_, *node.else_])
                case nodes.For(target=nodes.Name(), recursive=False):
                    of_messages = self._all([node.iter], _Is.MESSAGES) is _Is.MESSAGES
                    self._name(node.target.name, _Is.MESSAGE if of_messages else _Is.PLAIN)
                    self._all([node.test])
                    self.read([*node.body, *node.else_])
                case _:
                    self.kind(node)

    def kind(self, node: nodes.Node) -> _Is:
        """Return what the value of an expression may contain."""
        match node:
            case nodes.Name():
                return self.names.get(node.name, _Is.PLAIN)
            case nodes.Getattr() | nodes.Getitem():
                return self._part(node)
            case nodes.Filter(name="trim", node=text, args=[], kwargs=[], dyn_args=None, dyn_kwargs=None):
                return self._all([text], _Is.TEXT)
            case nodes.Call(
                node=nodes.Getattr(attr="strip", node=text), args=[], kwargs=[], dyn_args=None, dyn_kwargs=None
            ):
                return self._all([text], _Is.TEXT)
            case nodes.Add() | nodes.Concat():
                return self._all(node.iter_child_nodes(), _Is.TEXT)
            case nodes.CondExpr():
                self._all([node.test], _Is.MESSAGES)
                return self._all([node.expr1, node.expr2], _Is.TEXT)
            case nodes.Filter(name=name, args=[], kwargs=[], dyn_args=None, dyn_kwargs=None) if name in _PLAIN_FILTERS:
                return self._all([node.node])
            case nodes.Call(node=nodes.Name(name=name), dyn_args=None, dyn_kwargs=None) if name in _PLAIN_CALLS:
                return self._all([*node.args, *node.kwargs])
            case _ if isinstance(node, _PLAIN_IF_ITS_PARTS_ARE):
                return self._all(node.iter_child_nodes())
        raise _Unproven

    def _part(self, node: nodes.Getattr | nodes.Getitem) -> _Is:
        """Return what `x.key` or `x[key]` may contain."""
        of, argument = self.kind(node.node), getattr(node, "arg", None)
        key = argument.value if isinstance(argument, nodes.Const) else getattr(node, "attr", None)
        if of is _Is.MESSAGE and key in ("role", "content"):
            return _Is.TEXT if key == "content" else _Is.PLAIN
        if of is _Is.MESSAGES and argument is not None:
            self._all([argument])
            return _Is.MESSAGES if isinstance(argument, nodes.Slice) else _Is.MESSAGE
        if of is _Is.PLAIN or (of is _Is.LOOP and key in _ABOUT_LOOPS):
            return self._all([argument])
        raise _Unproven

    def _all(self, expressions: Iterable[nodes.Node | None], also: _Is = _Is.PLAIN) -> _Is:
        """Return `also` if any of the expressions is of that kind, and PLAIN if all are plain. Other kinds raise _Unproven."""
        found = {self.kind(each) for each in expressions if each is not None}
        if not found <= {_Is.PLAIN, also}:
            raise _Unproven
        return also if also in found else _Is.PLAIN

    def _name(self, name: str, kind: _Is) -> None:
        """Note what is assigned to a name. A name to which both plain values and texts are assigned counts as a text."""
        both = {self.names.get(name, kind), kind}
        if len(both) > 1 and both != {_Is.PLAIN, _Is.TEXT}:
            raise _Unproven
        joined = _Is.TEXT if _Is.TEXT in both else kind
        self.learned |= self.names.get(name) is not joined
        self.names[name] = joined
