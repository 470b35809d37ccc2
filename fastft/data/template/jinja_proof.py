"""Whether a chat template provably puts the texts of messages into its output as they are, or trimmed: read, not rendered.

    leaves_texts_alone(source)    # True: what it writes around texts depends on roles and positions alone

Where that is so, one rendering with marks in the place of texts tells every other rendering of the same roles, which saves
a rendering for each conversation (4 % of a cleaning run). The proof follows messages and their texts through the Jinja
syntax tree: a text may be concatenated, trimmed, given a name, chosen by a condition that does not look at it, and put
out. Anything else that touches one (a comparison, another filter, a call, a loop over it) leaves the question open, and
the template is rendered for each conversation. So does whatever is not known to give plain strings, the same at each time:
beside `('<s>' | safe)`, `+` escapes a text.
"""

from collections.abc import Iterable
from enum import Enum

from jinja2 import Environment, TemplateSyntaxError, nodes

_ABOUT_LOOPS = {"first", "last", "index", "index0", "revindex", "revindex0", "length"}  # `loop.previtem` is a message
# What is known to give plain strings, numbers and truth values.
_PLAIN_FILTERS = {"trim", "length", "upper", "lower", "capitalize", "title"}
_PLAIN_CALLS = {"raise_exception", "namespace", "range"}
_PLAIN_IF_ITS_PARTS_ARE = (
    nodes.TemplateData, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Slice,
    nodes.BinExpr, nodes.UnaryExpr, nodes.Compare, nodes.Operand, nodes.Test,
    nodes.Assign, nodes.NSRef, nodes.Break, nodes.Continue,
)  # fmt: skip


class _Is(Enum):
    """What an expression may hold of the conversation."""

    PLAIN = "nothing but roles, and what the template says itself"
    TEXT = "texts, among other text"
    MESSAGE = "a message"
    MESSAGES = "a list of messages"
    LOOP = "Jinja's `loop`"


class _Open(Exception):
    """Something that is not known to leave texts alone."""


def leaves_texts_alone(source: str) -> bool:
    try:
        body = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source).body  # noqa: S701  nothing is rendered
        reader = _Reader()
        while reader.learned:  # a loop may use a name before the line that says what it is
            reader.learned = False
            reader.read(body)
    except (_Open, TemplateSyntaxError, RecursionError, ValueError):  # transformers knows more tags; and absurd ones
        return False
    return True


class _Reader:
    def __init__(self):
        # Other names are plain until they are given something else.
        self.names = {"messages": _Is.MESSAGES, "loop": _Is.LOOP}
        self.learned = True

    def read(self, statements: Iterable[nodes.Node]) -> None:
        for node in statements:
            match node:
                case nodes.Output():
                    self._all(node.nodes, _Is.TEXT)
                case nodes.Assign(target=nodes.Name()):
                    self._name(node.target.name, self.kind(node.node))
                case nodes.If():
                    self._all([node.test], _Is.MESSAGES)  # whether there are any
                    self.read([*node.body, *node.elif_, *node.else_])
                case nodes.For(target=nodes.Name(), recursive=False):
                    of_messages = self._all([node.iter], _Is.MESSAGES) is _Is.MESSAGES
                    self._name(node.target.name, _Is.MESSAGE if of_messages else _Is.PLAIN)
                    self._all([node.test])
                    self.read([*node.body, *node.else_])
                case _:
                    self.kind(node)

    def kind(self, node: nodes.Node) -> _Is:
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
        raise _Open

    def _part(self, node: nodes.Getattr | nodes.Getitem) -> _Is:
        of, argument = self.kind(node.node), getattr(node, "arg", None)
        key = argument.value if isinstance(argument, nodes.Const) else getattr(node, "attr", None)
        if of is _Is.MESSAGE and key in ("role", "content"):
            return _Is.TEXT if key == "content" else _Is.PLAIN
        if of is _Is.MESSAGES and argument is not None:
            self._all([argument])
            return _Is.MESSAGES if isinstance(argument, nodes.Slice) else _Is.MESSAGE
        if of is _Is.PLAIN or (of is _Is.LOOP and key in _ABOUT_LOOPS):
            return self._all([argument])
        raise _Open

    def _all(self, expressions: Iterable[nodes.Node | None], also: _Is = _Is.PLAIN) -> _Is:
        """`also` where one of them is that, plain where all are; nothing else may be among them."""
        found = {self.kind(each) for each in expressions if each is not None}
        if not found <= {_Is.PLAIN, also}:
            raise _Open
        return also if also in found else _Is.PLAIN

    def _name(self, name: str, kind: _Is) -> None:
        both = {self.names.get(name, kind), kind}
        if len(both) > 1 and both != {_Is.PLAIN, _Is.TEXT}:
            raise _Open
        joined = _Is.TEXT if _Is.TEXT in both else kind
        self.learned |= self.names.get(name) is not joined
        self.names[name] = joined
