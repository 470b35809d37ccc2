"""Write `dump.json`, the raw dump of shared chats that `fastft demo` cleans and trains on.

    python -m fastft.demo.make_dump

The conversations are written by hand in `sources/*.md`. This module makes them look like a real dump: assistant turns become
the HTML of a chat page (five generations of it, KaTeX formulas stated three times, links that open a new tab), human turns
as plain text, and they are mixed with the faulty records that a cleaner has to find. The same sources always give the same
bytes; tests/demo/test_demo_dump.py checks that `dump.json` is what this module writes now.

A source file holds conversations like this one; its name begins with their language:

    ---
    id: green-tea

    ## user

    How do I make tea?

    ## assistant

    Any **markdown**, formulas as `$…$` or on lines of their own between two `$$`.
"""

import hashlib
import html
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML

HERE = Path(__file__).parent
DUMP = HERE / "dump.json"
SOURCES = HERE / "sources"

# What the cleaner should say about each conversation of sources/dirt.md: why it is rejected …
DIRT = {
    "empty-jam": "empty_answer",
    "empty-boat": "empty_answer",
    "empty-tags": "empty_answer",
    "order-two-humans": "wrong_role_order",
    "order-correction": "wrong_role_order",
    "order-impatient": "wrong_role_order",
    "blocked-filler": "blocked_phrase",
    "blocked-followers": "blocked_phrase",
    "blocked-prize": "blocked_phrase",
    "banner-hour": "error_banner",
    "banner-network": "error_banner",
    "only-question": "too_short",
    "only-answer": "too_short",
    "glossary": "over_window",
}
# … or how it is repaired and kept.
REPAIRED = {
    "order-assistant-first": "dropped_leading_assistant",
    "order-two-answers": "merged_assistant_turns",
    "order-last-question": "trimmed_last_question",
    "empty-second": "dropped_rounds:empty_answer",
    "banner-second": "dropped_rounds:error_banner",
}

# Copies of good conversations, (id, rounds): None copies the whole dialogue, a number only that many first rounds. The
# cleaner should keep the longest of each.
COPIES = [
    ("green-tea", None),
    ("sourdough", None),
    ("de-brot", None),
    ("zh-tea", None),
    ("fizzbuzz", 1),
    ("lisbon", 1),
    ("es-tortilla", 1),
]

# Records that are no conversations, and the reason for which each is rejected.
BROKEN = [
    (42, "not_a_conversation"),
    ("How do I export my chats?", "not_a_conversation"),
    (None, "not_a_conversation"),
    ({"id": "u8Qm2Zd", "title": "Untitled", "views": 3}, "not_a_conversation"),
    ({"id": "Rk4nT0s", "conversations": "deleted by its owner"}, "not_a_conversation"),
    (
        {
            "id": "b7Xw9Ea",
            "conversations": [{"from": "human", "value": "Is it 5 or 6?"}, {"from": "gpt", "value": 6}],
        },
        "not_a_conversation",
    ),
    ({"id": "p0LcV3y", "conversations": []}, "too_short"),
    (
        {
            "id": "Yh2sD6k",
            "conversations": [
                {"from": "human", "value": "Tell me a short story about a lighthouse."},
                {"from": "narrator", "value": "<div><p>Once upon a time the lamp went out.</p></div>"},
            ],
        },
        "unknown_role",
    ),
]

# Conversations whose first question lost half of an emoji: a lone surrogate, legal in JSON, impossible in UTF-8.
CUT_EMOJI = ["umbrella", "es-lluvia"]

# Empty answers in other forms than an empty wrapper: nothing at all, and tags around nothing.
EMPTY_PAGES = {"empty-jam": "", "empty-tags": '<div class="markdown prose w-full break-words"><p></p></div>'}

# Conversations whose answers have their length written below, as a browser extension did.
FOOTERS = ["jet-lag", "es-granada"]

# What the cleaner should report. It rejects with `over_window` only if --max_tokens and --overlong reject are given.
EXPECTED = {
    "input": 210,
    "kept": 181,
    "rejected": {
        "blocked_phrase": 3,
        "duplicate": 4,
        "duplicate_beginning": 3,
        "empty_answer": 3,
        "error_banner": 2,
        "not_a_conversation": 6,
        "over_window": 1,
        "too_short": 3,
        "unknown_role": 1,
        "wrong_role_order": 3,
    },
}


@dataclass(frozen=True)
class Dialogue:
    """A conversation as written: (role, text) turns, roles "user" and "assistant", text in markdown."""

    id: str
    lang: str
    turns: list[tuple[str, str]]

    @property
    def good(self) -> bool:
        """Whether the cleaner should keep it unchanged, turn by turn."""
        return self.id not in DIRT and self.id not in REPAIRED


@dataclass(frozen=True)
class Era:
    """The page's HTML during some months: classes of an answer's wrapper, and the frame around a code block."""

    wrapper: str
    code: str


# The bar above a code block holds the language and the button whose text naive converters leave in the code.
BAR = "flex items-center relative text-gray-200 bg-gray-800 px-4 py-2 text-xs font-sans"
BUTTON = (
    '<button class="flex ml-auto gap-2"><svg stroke="currentColor" fill="none" stroke-width="2" viewBox="0 0 24 24" '
    'class="h-4 w-4" height="1em" width="1em" xmlns="http://www.w3.org/2000/svg"><path d="M16 4h2a2 2 0 0 1 2 2v14">'
    '</path><rect x="8" y="2" width="8" height="4" rx="1" ry="1"></rect></svg>Copy code</button>'
)
BODY = '<div class="p-4 overflow-y-auto"><code class="!whitespace-pre hljs{language_class}">{code}</code></div>'

ERA_A = Era(
    "request-:r0:-3 markdown prose dark:prose-invert break-words dark",
    f'<pre><div class="bg-black mb-4 rounded-md"><div class="{BAR}">{BUTTON}</div>{BODY}</div></pre>',
)
ERA_B = Era(
    "markdown prose w-full break-words dark:prose-invert light",
    f'<pre><div class="bg-black mb-4 rounded-md"><div class="{BAR}"><span class="">{{language}}</span>{BUTTON}</div>'
    f"{BODY}</div></pre>",
)
ERA_C = Era(
    "markdown prose w-full break-words dark:prose-invert dark",
    f'<pre><div class="bg-black rounded-md mb-4"><div class="{BAR} justify-between rounded-t-md">'
    f"<span>{{language}}</span>{BUTTON}</div>{BODY}</div></pre>",
)
ERA_D = Era(
    "markdown prose w-full break-words dark:prose-invert light",
    '<pre><div class="dark bg-gray-950 rounded-md"><div class="flex items-center relative text-token-text-secondary '
    'bg-token-main-surface-secondary px-4 py-2 text-xs font-sans justify-between rounded-t-md"><span>{language}</span>'
    f'<span class="" data-state="closed">{BUTTON}</span></div>{BODY}</div></pre>',
)
# What was left when the site that stored the chats had removed buttons (but not their text) and the outer classes.
ERA_STORED = Era(
    "",
    f'<pre><div class="bg-black mb-4 rounded-md"><div class="{BAR}"><span class="">{{language}}</span>Copy code</div>'
    f"{BODY}</div></pre>",
)
ERAS = [ERA_B, ERA_C, ERA_D, ERA_A, ERA_STORED]

KEYWORDS = {
    "python": "def return for in if else elif while import from as with not and or is None True False class try except",
    "bash": "for do done if then fi in while echo cd export",
    "sql": "SELECT FROM WHERE GROUP BY ORDER HAVING JOIN ON AS AND COUNT AVG SUM INSERT INTO VALUES DESC LIMIT NOT NULL",
    "javascript": "const let function return for of if else new await async",
    "json": "true false null",
}
STRING_OR_COMMENT = r'(?P<comment>#[^\n]*|--[^\n]*|//[^\n]*)|(?P<string>"[^"\n]*"|\'[^\'\n]*\')'


def read_sources() -> list[Dialogue]:
    """Every conversation of sources/*.md, by file name and then in the order of the file."""
    return [source for path in sorted(SOURCES.glob("*.md")) for source in _parse(path)]


def _parse(path: Path) -> Iterator[Dialogue]:
    lang = path.stem.split("_")[0]
    for block in re.split(r"^---\n(?=id: )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, *parts = re.split(r"^## (user|assistant)$", block, flags=re.MULTILINE)
        turns = [(role, text.strip("\n")) for role, text in zip(parts[::2], parts[1::2])]
        yield Dialogue(head.split()[1], lang, turns)


class PageRenderer(RendererHTML):
    """Markdown tokens as the chat page had them: no line ends between tags, its own frames for code and formulas."""

    def renderToken(self, tokens, idx, options, env):
        token = tokens[idx]
        if token.hidden:
            return ""
        return f"<{'/' if token.nesting == -1 else ''}{token.tag}{self.renderAttrs(token)}>"

    def link_open(self, tokens, idx, options, env):
        tokens[idx].attrSet("target", "_new")
        return self.renderToken(tokens, idx, options, env)

    def fence(self, tokens, idx, options, env):
        language = tokens[idx].info.strip()
        era = env["era"] if language else ERA_A
        return era.code.format(
            language=language,
            language_class=f" language-{language}" if language else "",
            code=highlight(tokens[idx].content, language),
        )

    def math_inline(self, tokens, idx, options, env):
        return f'<span class="math math-inline">{katex(tokens[idx].content)}</span>'

    def math_block(self, tokens, idx, options, env):
        formula = katex(tokens[idx].content, display=True)
        return f'<div class="math math-display"><span class="katex-display">{formula}</span></div>'


def page_html(markdown: str, era: Era, footer: str = "") -> str:
    """The answer `markdown` as the page of `era` showed it."""
    attribute = f' class="{era.wrapper}"' if era.wrapper else ""
    return f"<div{attribute}>{MARKDOWN.render(markdown, {'era': era})}{footer}</div>"


def highlight(code: str, language: str) -> str:
    """Escaped `code` with the spans that the page's highlighter puts around keywords, strings and comments."""
    words = "|".join(KEYWORDS.get(language, "").split())
    pattern = STRING_OR_COMMENT + (rf"|\b(?P<keyword>{words})\b" if words else "")
    parts, end = [], 0
    for match in re.finditer(pattern, code) if language else ():
        parts.append(html.escape(code[end : match.start()], quote=False))
        parts.append(f'<span class="hljs-{match.lastgroup}">{html.escape(match[0], quote=False)}</span>')
        end = match.end()
    return "".join(parts) + html.escape(code[end:], quote=False)


GLYPHS = {
    "times": "×",
    "cdot": "⋅",
    "approx": "≈",
    "sqrt": "√",
    "pi": "π",
    "eta": "η",
    "theta": "θ",
    "nabla": "∇",
    "le": "≤",
    "log": "log",
    "cos": "cos",
    "div": "÷",
}


def katex(tex: str, display: bool = False) -> str:
    """A formula stated three times, as KaTeX does: MathML for screen readers, the TeX source, and visible glyphs."""
    mathml, visible = [], []
    for command, number, sign in re.findall(r"\\([a-zA-Z]+)|(\d+(?:\.\d+)?)|([^\s{}_^\\])", tex):
        glyph = html.escape(GLYPHS.get(command, "") or number or sign)
        tag = "mn" if number else "mi" if glyph.isalpha() else "mo"
        if glyph:
            mathml.append(f"<{tag}>{glyph}</{tag}>")
            visible.append(f'<span class="mord">{glyph}</span>')
    block = ' display="block"' if display else ""
    return (
        f'<span class="katex"><span class="katex-mathml"><math xmlns="http://www.w3.org/1998/Math/MathML"{block}>'
        f'<semantics><mrow>{"".join(mathml)}</mrow><annotation encoding="application/x-tex">'
        f'{html.escape(tex, quote=False)}</annotation></semantics></math></span><span class="katex-html" '
        f'aria-hidden="true"><span class="base">{"".join(visible)}</span></span></span>'
    )


def _inline_formula(state, silent: bool) -> bool:
    """markdown-it rule: `$tex$`, not a price."""
    match = re.compile(r"\$(?![\s$])([^$\n]*[^\s$])\$(?!\d)").match(state.src, state.pos)
    if not match:
        return False
    if not silent:
        state.push("math_inline", "span", 0).content = match[1]
    state.pos = match.end()
    return True


def _display_formula(state, start: int, end: int, silent: bool) -> bool:
    """markdown-it rule: lines between two lines that hold `$$`."""
    lines = [state.src[state.bMarks[n] : state.eMarks[n]] for n in range(start, end)]
    if lines[0] != "$$" or "$$" not in lines[1:]:
        return False
    closing = lines.index("$$", 1)
    if not silent:
        state.push("math_block", "div", 0).content = "\n".join(lines[1:closing])
    state.line = start + closing + 1
    return True


def _markdown() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=PageRenderer).enable("table")
    parser.inline.ruler.before("escape", "math_inline", _inline_formula)
    parser.block.ruler.before("fence", "math_block", _display_formula, {"alt": ["paragraph", "list"]})
    return parser


MARKDOWN = _markdown()


def record_id(name: str) -> str:
    """Seven letters and digits, like the ids of shared chats."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return "".join(alphabet[number // 62**place % 62] for place in range(7))


def share_record(source: Dialogue, era: Era, rounds: int | None = None, name: str | None = None) -> dict:
    """`source` (its first `rounds` only) as one element of a dump."""
    turns = source.turns[: 2 * rounds] if rounds else source.turns
    conversations = [
        {"from": "human", "value": text} if role == "user" else {"from": "gpt", "value": _answer(source, text, era)}
        for role, text in turns
    ]
    if source.id in CUT_EMOJI:
        conversations[0]["value"] += " \ud83d"
    record = {"id": record_id(name or source.id), "conversations": conversations}
    if record["id"][0].islower():  # some of the tools that saved chats wrote this field, others did not
        record["model"] = "Model: Default"
    return record


def pick_era(source: Dialogue, number: int) -> Era:
    """The next era in rotation. The oldest page is skipped for code blocks with a language, because it showed none."""
    era = ERAS[number % len(ERAS)]
    has_language = any(re.search(r"^ *```\w", text, re.MULTILINE) for _, text in source.turns)
    return ERA_STORED if era is ERA_A and has_language else era


def _answer(source: Dialogue, text: str, era: Era) -> str:
    if not text:
        return EMPTY_PAGES.get(source.id, page_html("", era))
    footer = f"<div>Copy{len(text)} chars / {len(text.split())} words</div>" if source.id in FOOTERS else ""
    return page_html(text, era, footer)


def make_records() -> list:
    """The dump: good and faulty records mixed, always in the same order."""
    sources = read_sources()
    by_id = {source.id: source for source in sources}
    records = [share_record(source, pick_era(source, number)) for number, source in enumerate(sources)]
    records += [
        share_record(by_id[name], pick_era(by_id[name], number), rounds, name=f"copy of {name}")
        for number, (name, rounds) in enumerate(COPIES)
    ]
    records += [record for record, _ in BROKEN]
    random.Random(2023).shuffle(records)
    return records


def dump_text(records: list) -> str:
    """`records` as JSON that people can read: text as it is, except lone surrogates, which UTF-8 cannot hold."""
    text = json.dumps(records, ensure_ascii=False, indent=1) + "\n"
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def main() -> None:
    text = dump_text(make_records())
    DUMP.write_text(text, encoding="utf-8")
    good = [source for source in read_sources() if source.good]
    clean = sum(len(turn) for source in good for _, turn in source.turns)
    print(f"{DUMP}: {len(text.encode()):,} bytes, {len(good)} good conversations with {clean:,} characters")


if __name__ == "__main__":
    main()
