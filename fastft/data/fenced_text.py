"""Cut a Markdown text anywhere, so that code stays code: a code fence that is cut is closed, and opened again after the cut.

text = FencedText(answer)
text.piece(0, 400), text.piece(400, len(text))    # two pieces, each with as many fences opened as closed
next(text.preferred(0, text.line_ends(0)))        # where to cut
"""

import bisect
import re
from collections.abc import Iterator, Sequence

GAP = "\n\n[…]\n\n"  # replaces the middle of a text that was left out


class FencedText:
    """A Markdown text and where its code fences are."""

    _FENCE = re.compile(r"^([ \t>]*)(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)

    def __init__(self, text: str):
        self.text = text
        # From position changes[i] on, the text is inside of the fence fences[i] (its indentation, its backticks or tildes, its
        # whole opening line), or outside of code where that is None.
        self.changes: list[int] = [0]
        self.fences: list[tuple[str, str, str] | None] = [None]
        for line in self._FENCE.finditer(text):
            indent, delimiter, rest = line.groups()
            fence = self.fences[-1]
            if fence is None and not (delimiter[0] == "`" and "`" in rest):
                self.changes.append(line.end() + 1)
                self.fences.append((indent, delimiter, line.group()))
            elif fence and delimiter[0] == fence[1][0] and len(delimiter) >= len(fence[1]) and not rest.strip():
                self.changes.append(line.end())
                self.fences.append(None)

    def __len__(self) -> int:
        return len(self.text)

    def fence_at(self, position: int) -> tuple[str, str, str] | None:
        """Return (indentation, delimiter, opening line) of the fence that a cut at `position` would be in, or None."""
        return self.fences[bisect.bisect_right(self.changes, position) - 1]

    def around(self, start: int, end: int) -> tuple[str, str]:
        """Return what must be put before and after text[start:end], so that its fences are opened and closed."""
        opened, left = self.fence_at(start), self.fence_at(end) if end < len(self.text) else None
        before = f"{opened[2]}\n" if opened and start else ""
        after = "" if left is None else f"{'' if self.text[end - 1] == chr(10) else chr(10)}{left[0]}{left[1]}"
        return before, after

    def piece(self, start: int, end: int) -> str:
        """Return text[start:end] with what `around` puts before and after it."""
        before, after = self.around(start, end)
        return f"{before}{self.text[start:end]}{after}"

    def tail(self, end: int, size: int) -> int:
        """Return where the last `size` characters before `end` begin, or the first line in them, if one begins there."""
        visible = len(self.text[:end].rstrip())
        start = max(visible - size, 0)
        line = self.text.find("\n", start, visible) + 1
        return line if start and line else start

    def without_middle(self, size: int) -> tuple[str, str]:
        """Return (the beginning and the end of the text with GAP between them, what is left out between them).

        Beginning and end have at most `size` characters together. The beginning ends with a line if a line ends in its
        second half, and the end begins with a line if one begins in it.
        """
        most = size - size // 2  # characters of the beginning
        line = self.text.rfind("\n", most // 2, most) + 1
        left_from = line or most
        left_to = max(self.tail(len(self.text), size // 2), left_from) if size > 1 else len(self.text)
        return f"{self.piece(0, left_from)}{GAP}{self.piece(left_to, len(self.text))}", self.text[left_from:left_to]

    def line_ends(self, start: int) -> list[int]:
        """Return the position after each line that ends after `start`; the last is the end of the text."""
        found = [m.end() for m in re.compile(r"\n").finditer(self.text, start)]
        return found if found and found[-1] == len(self.text) else [*found, len(self.text)]

    def preferred(self, start: int, ends: Sequence[int]) -> Iterator[int]:
        """Yield `ends` (positions after lines) again, the best place for a cut first.

        The end of the text is best, then come places after paragraphs, then after lines outside of code, then others. Of
        each kind the longest piece comes first. Places in the first half come last, whatever their kind. A place that is of
        several kinds is yielded several times.
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
