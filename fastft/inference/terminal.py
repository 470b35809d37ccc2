"""Talk to a model in the terminal: `fastft chat --model DIR`.

The answer is shown while it is made and ends at the model's own end of turn. `/reset` forgets the conversation, `/quit` (or
Ctrl-D) leaves, Ctrl-C stops an answer. Nothing typed becomes a control token, and nothing answered becomes a terminal's command.
"""

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from fastft.common.command_line import parse, run_module
from fastft.data.conversation import Message
from fastft.errors import UserError
from fastft.inference.engine import ChatModel


@dataclass(kw_only=True)
class ChatConfig:
    """The model, and how it answers."""

    model: str
    """A model's directory (fastft train leaves one in OUTPUT_DIR/model)."""
    template: str | None = None
    """A built-in chat template's name, or a .jinja file; by default the tokenizer's own template."""
    system: str | None = None
    """A system message."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    max_new_tokens: int = 512
    """The longest answer, in tokens."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.max_new_tokens < 1:
            raise UserError("--temperature must not be below 0, and --max_new_tokens must be at least 1")


def main(argv: Sequence[str]) -> int:
    """Run `fastft chat` until the user leaves."""
    [config] = parse(argv, "fastft chat", "Talk to a model in the terminal.", ChatConfig)
    model = ChatModel(config.model, config.template)
    print(f"{config.model} on {model.device}. /reset forgets, /quit leaves.")
    system = [Message("system", config.system)] if config.system else []
    history: list[Message] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if line.strip() == "/quit":
            return 0
        if line.strip() == "/reset":
            history.clear()
            print("(forgotten)")
        elif line.strip() in ("/", "/help"):
            print("(commands: /reset, /quit)")
        elif line.strip():
            _answer(model, system, history, line, config)


def _answer(model: ChatModel, system: list[Message], history: list[Message], line: str, config: ChatConfig) -> None:
    """Print the answer while it is made, and keep the round in `history` unless it has failed or the answer is empty."""
    history.append(Message("user", line))
    pieces: list[str] = []
    try:
        for piece in model.stream([*system, *history], config.max_new_tokens, config.temperature):
            pieces.append(piece)
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(f"({error})", end="")
        pieces.clear()
    print()
    if pieces:
        history.append(Message("assistant", "".join(pieces)))
    else:
        history.pop()


def printable(text: str) -> str:
    """Return the text without characters that could control a terminal, because a model may write escape sequences.

    Control characters, surrogates and changes of the writing direction are replaced; joiners (in emoji and Persian) stay.
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _commands(c) else c for c in text)


def _commands(character: str) -> bool:
    changes_direction = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return changes_direction or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t")


if __name__ == "__main__":
    run_module(main)
