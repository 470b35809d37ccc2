"""How each piece of markdown is written: shared by the reference (`cleaning.html.markdown`) and the fast converter.

An `element` here is anything with `.get(attribute, default)`: an element of lxml or a tag of Beautiful Soup.
"""

import re

_SPACES = re.compile(r"[ \t\r\n]+")
_BACKTICKS = re.compile("`+")
_NUMBER = re.compile("[0-9]{1,8}")
_COLUMNS = re.compile("[0-9]{1,4}")
_ALIGN = re.compile(r"text-align:\s*(left|right|center)")
_RULES = {"left": ":---", "right": "---:", "center": ":---:"}


def fold_lines(text: str) -> str:
    """Return `text` without spaces around its line ends and without blank lines.

    The text is split into lines, because a regular expression that does the same looks at a run of n spaces n times.
    """
    if "\n" not in text:
        return text
    first, *between, last = text.split("\n")
    kept = [line for line in (line.strip(" \t\r") for line in between) if line]
    return "\n".join([first.rstrip(" \t\r"), *kept, last.lstrip(" \t\r")])


def enclose(text: str, start: str, end: str) -> str:
    """Put inline delimiters around `text`. White space at its ends is moved outside of them, as markdown requires."""
    stripped = text.strip()
    if not stripped:
        return text
    if len(stripped) == len(text):
        return start + text + end
    at = text.index(stripped)
    return f"{text[:at]}{start}{stripped}{end}{text[at + len(stripped) :]}"


def link(element, text: str) -> str:
    """Write a link. If the text is the address, write only the text, because the page turns bare addresses into links."""
    address, title = element.get("href"), element.get("title")
    stripped = text.strip()
    if not address or not stripped or (stripped == address and not title):
        return text
    return enclose(text, "[", f"]({address}{_quoted(title)})")


def image(element) -> str:
    return f"![{element.get('alt', '')}]({element.get('src', '')}{_quoted(element.get('title'))})"


def _quoted(title: str | None) -> str:
    return ' "' + title.replace('"', '\\"') + '"' if title else ""


def code_span(text: str) -> str:
    """Write a code span.

    Its delimiter is longer than any run of backticks inside, and is padded with spaces only if necessary.
    """
    text = text.replace("\n", " ")
    if "`" not in text and text[0] != " ":
        return f"`{text}`"
    padded = text[0] == "`" or text[-1] == "`" or (text[0] == text[-1] == " " and text.strip())
    delimiter = "`" * (_longest_run(text) + 1)
    return f"{delimiter} {text} {delimiter}" if padded else f"{delimiter}{text}{delimiter}"


def code_block(code: str, language: str) -> str:
    """Write a fenced code block. Its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, _longest_run(code) + 1)
    line_end = "" if not code or code.endswith("\n") else "\n"
    return f"\n\n{fence}{language}\n{code}{line_end}{fence}\n\n"


def code_block_in_cell(code: str) -> str:
    """Write each line of a code block as a code span of its own, because a table's cell cannot contain a block."""
    return "<br>".join(code_span(line) if line else "" for line in code.rstrip("\n").split("\n"))


def _longest_run(text: str) -> int:
    return max(map(len, _BACKTICKS.findall(text)), default=0) if "`" in text else 0


def formula(tex: str, display: bool) -> str:
    tex = tex.strip()
    return f"\n\n$$\n{tex}\n$$\n\n" if display else f"${tex}$"


def checkbox(element) -> str:
    """Write the box of a task list's item; nothing for other kinds of input."""
    if element.get("type") != "checkbox":
        return ""
    return "[x]" if element.get("checked") is not None else "[ ]"


def heading(level: int, text: str) -> str:
    return f"\n\n{'#' * level} {_SPACES.sub(' ', text.strip())}\n\n"


def quotation(text: str) -> str:
    lines = [f"> {line}" if line else ">" for line in text.split("\n")]
    return "\n" + "\n".join(lines) + "\n\n"


def list_item(bullet: str, text: str, loose: bool) -> str:
    """Write a list item, its further lines indented by the bullet's width, with blank lines around it if it is `loose`."""
    text = bullet + text.strip(" \t\n")
    if "\n" in text:
        indent = " " * len(bullet)
        first, *lines = text.split("\n")
        text = "\n".join([first, *[indent + line if line else "" for line in lines]])
    text = text.rstrip(" ")
    return f"\n\n{text}\n\n" if loose else f"\n{text}\n"


def first_number(ordered_list) -> int:
    """Return the number of the list's first item: its `start` if that is a number, or else 1."""
    start = ordered_list.get("start", "")
    return int(start) if _NUMBER.fullmatch(start) else 1


def cell(element, text: str) -> str:
    """Write a table's cell on one line. A `|` inside it is escaped, in code and formulas too."""
    text = text.strip(" \t\n").replace("\n", " ").replace("|", "\\|")
    return f" {text}" + " |" * columns(element)


def columns(cell) -> int:
    """Return how many columns the cell spans; at most 1,000, as in HTML."""
    span = cell.get("colspan", "")
    return min(1000, max(1, int(span))) if _COLUMNS.fullmatch(span) else 1


def row(cells: list, text: str, is_first: bool, is_header: bool) -> str:
    """Write a table's row. The first row is followed by the delimiter line. A table without a header gets an empty one,
    because Markdown tables need a header.
    """
    line = f"|{text}\n"
    if not is_first:
        return line
    rules = [rule for cell in cells for rule in [_rule(cell)] * columns(cell)]
    rule = "| " + " | ".join(rules) + " |\n"
    return line + rule if is_header else "|" + "  |" * len(rules) + "\n" + rule + line


def _rule(cell) -> str:
    style = _ALIGN.search(cell.get("style", ""))
    return _RULES.get(style.group(1) if style else cell.get("align", ""), "---")
