"""Writes the project's HTML pages, and formats the numbers and texts on them.

    write_page(Path("out/report.html"), Path(__file__).with_name("cleaning.html.jinja"), title="A page", …)

A page's template is beside the module that fills it. All of them extend page.html.jinja (layout, style, scripts) and may use
the macros of pieces.html.jinja. A page loads nothing from elsewhere, and its security policy forbids that. The values on it
come from other people, so all of them pass through `visible` and jinja's autoescape.
"""

import base64
import functools
import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.common.files import write_whole

if TYPE_CHECKING:
    import jinja2


LONGEST_TEXT = 20_000  # characters of a text that are shown, so that an endless answer does not fill the page


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Fill `template` with `values` and write the page to `path`. An earlier page stays until the new one is complete."""
    text = _environment(template.parent).get_template(template.name).render(values)
    write_whole(path, text.strip() + "\n")


@functools.cache
def _environment(directory: Path) -> "jinja2.Environment":
    """Jinja's environment for the templates in `directory`, which may extend and import those beside this module."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([directory, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (precise, compact, percent, duration, code_and_prose, sha256)
    made.filters |= {filter.__name__: filter for filter in filters}
    return made


# --- Charts -----------------------------------------------------------------------------------------------------------


def funnel(ledger: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a waterfall chart, from the input over what each reason rejected to what is kept.

    `left` and `bar` are percentages of the largest count: where a row's bar begins, and how long it is. The bar of a reason
    begins where the next one ends, so that the bars step down from the input to what is kept.
    """
    total, kept, parts = (ledger.get(key, 0) for key in ("input", "kept", "parts"))
    rows, left = [("input", "conversations in", total, 0)], total
    for reason, count in sorted(ledger.get("rejected", {}).items(), key=lambda item: (-item[1], item[0])):
        left = max(left - count, 0)
        rows.append(("reason", reason.replace("_", " "), count, left))
    rows += [("kept", "conversations kept", kept, 0), ("parts", "parts to train on", parts, 0)]
    scale = 100 / max(total, kept, parts, 1)
    return [
        {"kind": kind, "label": label, "count": count, "left": left * scale, "bar": count * scale}
        | {"share": count / total if total and kind != "parts" else None}
        for kind, label, count, left in rows
    ]


@dataclass
class Plot:
    """A plot with coordinates in percent of its width and height (from the top), so that it can be drawn at any size."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]]  # (class, path)
    hovers: list[tuple[float, float, str]]  # (left, width, text)
    legend: list[tuple[str, str, str]]  # (class, name, last value)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to seven round numbers for an axis from `low` to `high`, in steps of 1, 2 or 5 times a power of ten.

    The first is not above `low`, the last not below `high`. With `whole`, the steps are at least 1.
    """
    if high - low <= 1e-9 * abs(high):
        margin = abs(high) / 10 or 1.0
        low, high = (low - margin, high + margin) if low else (0.0, margin)
    magnitude = 10.0 ** math.floor(math.log10(high - low))
    step = next(magnitude * f for f in (0.2, 0.5, 1, 2) if (high - low) / (magnitude * f) <= 5)
    step = max(step, 1.0) if whole else step
    return [n * step for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


# --- Texts and numbers ------------------------------------------------------------------------------------------------

# Characters that are invisible, or change how their neighbours look: control characters except tab and newline, line
# separators, directional marks, zero-width characters except the joiners of scripts and emoji, tags, lone surrogates.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with each invisible character replaced by its code, such as \\x1b or \\u202e."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def code_and_prose(text: str) -> list[tuple[bool, str]]:
    """Split a text into pieces: (whether it is a fenced code block, its text). A text above LONGEST_TEXT is cut."""
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}\n[… {len(text) - LONGEST_TEXT:,} more characters]"
    pieces = re.split(r"(^```.*?(?:^```[ \t]*(?:\n|\Z)|\Z))", text, flags=re.MULTILINE | re.DOTALL)
    return [(i % 2 == 1, piece) for i, piece in enumerate(pieces) if piece]


def flatten(settings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield (dotted name, value as text) for every setting, with those in nested dictionaries."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "–"
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def precise(value: float) -> str:
    """A number with four significant digits: 0.4213, 12.5, 2e-5."""
    return re.sub(r"e([+-])0*", lambda e: "e-" if e[1] == "-" else "e", f"{value:.4g}")


def compact(value: float) -> str:
    """A number with three significant digits and a unit, as sizes of models are written: 950, 12.3k, 1.2M, 3B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # 999.6 would be written 1e+03
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share as a percentage: 12.3 %."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """A time as 9.5 s, 2 min 41 s or 3 h 05 min, with spaces at which no line breaks."""
    minutes, rest = divmod(round(seconds), 60)
    short = f"{seconds:.1f} s" if seconds < 60 else f"{minutes} min {rest:02d} s"
    return (short if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min").replace(" ", "\u00a0")


def sha256(text: str) -> str:
    """The digest of a script or style in base64, as a page's security policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
