"""How each piece of markdown is written, whoever walks the tree: used by `cleaning.html.markdown` and `cleaning.html.fast_markdown`.

An `element` here is anything with `.get(attribute, default)`: lxml's elements have it and Beautiful Soup's tags too.
"""

import re

_SPACES = re.compile(r"[ \t\r\n]+")
_BACKTICKS = re.compile("`+")
_NUMBER = re.compile("[0-9]{1,8}")
_COLUMNS = re.compile("[0-9]{1,4}")
_ALIGN = re.compile(r"text-align:\s*(left|right|center)")
_RULES = {"left": ":---", "right": "---:", "center": ":---:"}


def fold_lines(text: str) -> str:
    """`text` without spaces around its line ends and without blank lines.

    By splitting: the pattern that says the same looks at a run of n spaces n times.
    """
    if "\n" not in text:
        return text
    first, *between, last = text.split("\n")
    kept = [line for line in (line.strip(" \t\r") for line in between) if line]
    return "\n".join([first.rstrip(" \t\r"), *kept, last.lstrip(" \t\r")])


def enclose(text: str, mark: str, end: str) -> str:
    """An inline mark around `text`; spaces and line ends at its borders move outside, where markdown wants them."""
    stripped = text.strip()
    if not stripped:
        return text
    if len(stripped) == len(text):
        return mark + text + end
    start = text.index(stripped)
    return f"{text[:start]}{mark}{stripped}{end}{text[start + len(stripped) :]}"


def link(element, text: str) -> str:
    address, title = element.get("href"), element.get("title")
    stripped = text.strip()
    if not address or not stripped or (stripped == address and not title):
        return text  # the page makes links of bare addresses
    return enclose(text, "[", f"]({address}{_quoted(title)})")


def image(element) -> str:
    return f"![{element.get('alt', '')}]({element.get('src', '')}{_quoted(element.get('title'))})"


def _quoted(title: str | None) -> str:
    return ' "' + title.replace('"', '\\"') + '"' if title else ""


def code_span(text: str) -> str:
    """Its delimiter is longer than any run of backticks inside; spaces only where they are needed."""
    text = text.replace("\n", " ")
    if "`" not in text and text[0] != " ":
        return f"`{text}`"
    padded = text[0] == "`" or text[-1] == "`" or (text[0] == text[-1] == " " and text.strip())
    delimiter = "`" * (_longest_run(text) + 1)
    return f"{delimiter} {text} {delimiter}" if padded else f"{delimiter}{text}{delimiter}"


def code_block(code: str, language: str) -> str:
    fence = "`" * max(3, _longest_run(code) + 1)
    line_end = "" if not code or code.endswith("\n") else "\n"
    return f"\n\n{fence}{language}\n{code}{line_end}{fence}\n\n"


def code_block_in_cell(code: str) -> str:
    """One code span a line: no block can stand in a table's cell."""
    return "<br>".join(code_span(line) if line else "" for line in code.rstrip("\n").split("\n"))


def _longest_run(text: str) -> int:
    return max(map(len, _BACKTICKS.findall(text)), default=0) if "`" in text else 0


def formula(tex: str, display: bool) -> str:
    tex = tex.strip()
    return f"\n\n$$\n{tex}\n$$\n\n" if display else f"${tex}$"


def checkbox(element) -> str:
    """The box of a task list."""
    if element.get("type") != "checkbox":
        return ""
    return "[x]" if element.get("checked") is not None else "[ ]"


def heading(level: int, text: str) -> str:
    return f"\n\n{'#' * level} {_SPACES.sub(' ', text.strip())}\n\n"


def quotation(text: str) -> str:
    lines = [f"> {line}" if line else ">" for line in text.split("\n")]
    return "\n" + "\n".join(lines) + "\n\n"


def list_item(bullet: str, text: str, loose: bool) -> str:
    """An item, its further lines indented by the bullet's width; blank lines around it in a loose list."""
    text = bullet + text.strip(" \t\n")
    if "\n" in text:
        indent = " " * len(bullet)
        first, *lines = text.split("\n")
        text = "\n".join([first, *[indent + line if line else "" for line in lines]])
    text = text.rstrip(" ")
    return f"\n\n{text}\n\n" if loose else f"\n{text}\n"


def first_number(ordered_list) -> int:
    start = ordered_list.get("start", "")
    return int(start) if _NUMBER.fullmatch(start) else 1


def cell(element, text: str) -> str:
    """A table's cell. Everything in it is on one line, and a `|` of its own is escaped, also in code and formulas."""
    text = text.strip(" \t\n").replace("\n", " ").replace("|", "\\|")
    return f" {text}" + " |" * columns(element)


def columns(cell) -> int:
    span = cell.get("colspan", "")
    return min(1000, max(1, int(span))) if _COLUMNS.fullmatch(span) else 1


def row(cells: list, text: str, is_first: bool, is_header: bool) -> str:
    """A row; under the first the rule that makes it a table (a table without header gets an empty one)."""
    line = f"|{text}\n"
    if not is_first:
        return line
    rules = [rule for cell in cells for rule in [_rule(cell)] * columns(cell)]
    rule = "| " + " | ".join(rules) + " |\n"
    return line + rule if is_header else "|" + "  |" * len(rules) + "\n" + rule + line


def _rule(cell) -> str:
    style = _ALIGN.search(cell.get("style", ""))
    return _RULES.get(style.group(1) if style else cell.get("align", ""), "---")
