"""Cut a Markdown text anywhere, and keep code in code: a fence around a cut is closed before it and opened again after it.

text = FencedText(answer)
text.piece(0, 400), text.piece(400, len(text))    # two pieces, each with as many fences opened as closed
next(text.preferred(0, text.line_ends(0)))        # where to cut
"""

import bisect
import re
from collections.abc import Iterator, Sequence

GAP = "\n\n[…]\n\n"  # stands where the middle of a text was left out


class FencedText:
    """A Markdown text and where its code fences are."""

    _FENCE = re.compile(r"^([ \t>]*)(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)

    def __init__(self, text: str):
        self.text = text
        # From position changes[i] on, the text is inside of fences[i]: (indentation, marks, opening line), or of none.
        self.changes: list[int] = [0]
        self.fences: list[tuple[str, str, str] | None] = [None]
        for line in self._FENCE.finditer(text):
            indent, marks, rest = line.groups()
            fence = self.fences[-1]
            if fence is None and not (marks[0] == "`" and "`" in rest):
                self.changes.append(line.end() + 1)
                self.fences.append((indent, marks, line.group()))
            elif fence and marks[0] == fence[1][0] and len(marks) >= len(fence[1]) and not rest.strip():
                self.changes.append(line.end())
                self.fences.append(None)

    def __len__(self) -> int:
        return len(self.text)

    def fence_at(self, position: int) -> tuple[str, str, str] | None:
        """(indentation, marks, opening line) of the fence that a cut at `position` would be in."""
        return self.fences[bisect.bisect_right(self.changes, position) - 1]

    def around(self, start: int, end: int) -> tuple[str, str]:
        """What must be put before and after text[start:end] for its fences to be opened and closed."""
        opened, left = self.fence_at(start), self.fence_at(end) if end < len(self.text) else None
        before = f"{opened[2]}\n" if opened and start else ""
        after = "" if left is None else f"{'' if self.text[end - 1] == chr(10) else chr(10)}{left[0]}{left[1]}"
        return before, after

    def piece(self, start: int, end: int) -> str:
        """text[start:end] with what `around` puts before and after it."""
        before, after = self.around(start, end)
        return f"{before}{self.text[start:end]}{after}"

    def tail(self, end: int, size: int) -> int:
        """Where the last `size` characters before `end` begin; at the first beginning of a line if there is one in them."""
        visible = len(self.text[:end].rstrip())
        start = max(visible - size, 0)
        line = self.text.find("\n", start, visible) + 1
        return line if start and line else start

    def without_middle(self, size: int) -> tuple[str, str]:
        """(beginning and end of the text, at most `size` characters together, with GAP between them; what is left out).

        The beginning stops after a line if its second half has such a place, and the end starts with a line if it can.
        """
        first = size - size // 2
        line = self.text.rfind("\n", first // 2, first) + 1
        stop = line or first
        start = max(self.tail(len(self.text), size // 2), stop) if size > 1 else len(self.text)
        return f"{self.piece(0, stop)}{GAP}{self.piece(start, len(self.text))}", self.text[stop:start]

    def line_ends(self, start: int) -> list[int]:
        """The position after each line that ends after `start`; the last is the end of the text."""
        found = [m.end() for m in re.compile(r"\n").finditer(self.text, start)]
        return found if found and found[-1] == len(self.text) else [*found, len(self.text)]

    def preferred(self, start: int, ends: Sequence[int]) -> Iterator[int]:
        """`ends`, the best place for a cut first: the end of the text, after paragraphs, after lines outside of code, others.

        Of each kind the longest piece comes first. Places in the first half come last, whatever their kind.
        """
        if ends[-1] == len(self.text):
            yield ends[-1]
        middle = start + (ends[-1] - start) // 2
        late = [end for end in reversed(ends) if end > middle and end < len(self.text)]
        outside = [end for end in late if self.fence_at(end) is None]
        yield from (end for end in outside if self.text.endswith("\n\n", 0, end) or self.text.startswith("\n", end))
        yield from outside
        yield from late
        yield from (end for end in reversed(ends) if end <= middle)
