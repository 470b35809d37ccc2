"""The eras of sharegpt.com: what its server and its browser extension did to a text before it was shared.

    before 2023-03-11   Nothing: an answer is the page's HTML with its classes, a question is the text as it was typed.
    from 2023-03-11     Every value passed through sanitize-html, questions included: unknown tags and most classes are
                        gone, and in text `&`, `<` and `>` have become `&amp;`, `&lt;` and `&gt;`.
    until 2023-04-01    Questions begin with the page's branch counter ("1 / 1"), glued to their text.

A string alone does not tell its era, because somebody may have typed `&lt;`. But what the sanitiser does is known exactly, so
a conversation can show that it was never sanitised: by an answer with the page's own wrapper, a button or an image, or by a
question with a bare `<` or `&`. An answer in a wrapper without classes, on the other hand, is what the sanitiser leaves.

Some tools saved only what is inside the wrapper (`<p>…</p><pre>…`). Only the dump as a whole shows whether such answers come
from the page: they do if nearly all answers are like that and hardly any question asks for HTML.

`survey` counts this evidence over the first records of a dump, `decide` draws the conclusions, and `apply_era` applies them
to one conversation. In real dumps of verbatim text, 0.4 to 11 % of the questions hold a bare `&`, `<` or `>`; of 4,600
questions in such dumps, none held entities only. In doubt the text stays as it is, and the doubtful cases are counted.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from cleaning.sources.turns import RawConversation, Turn

# The values of `--era`: "auto", or what the user knows. "none" means that the text has been cleaned already.
ERAS = ("auto", "before", "escaped", "escaped_pager", "none")

SAMPLE_RECORDS = 5_000
SAMPLE_BYTES = 16 << 20  # of the uncompressed file, about 1 s of reading

# The page's own wrapper around an answer, 2022-12 to 2024. Nobody writes this class by hand. Some tools also saved the
# boxes around the wrapper.
_WRAPPER = r'<div[^>]{0,500}?\sclass="[^"]{0,500}?\bmarkdown\b[^"]{0,500}?\b(?:prose|break-words)\b'
_PAGE_WRAPPER = re.compile(rf"\s*(?:<div[^>]{{0,500}}>\s*){{0,4}}?{_WRAPPER}")
_WRAPPER_ANYWHERE = re.compile(_WRAPPER)
# The sanitised wrapper: a bare <div>, directly followed by a block. People would put a line end in between.
_BARE_WRAPPER = re.compile(r"<div><(?:p|pre|ol|ul|h[1-6]|table|blockquote|hr)\b(?s:.*)</div>\s*\Z")
_FRAGMENT = re.compile(r"\s*<(?:div|p|pre|ol|ul|h[1-6]|table|blockquote)\b[^<>]*>(?s:.*)>\s*\Z")
# The content of a wrapper: it begins and ends with a block that markdown has, and the first one has no styling.
_BLOCKS = re.compile(
    r"\s*<(?:p|pre|ul|ol(?: start=\"\d+\")?|h[1-6]|table|blockquote)>(?s:.*)"
    r"</(?:p|pre|ol|ul|h[1-6]|table|blockquote|div)>\s*\Z"
)
# Tags that come neither from rendered markdown nor from a code block's header: HTML written by the user or the model.
_OWN_HTML = re.compile(
    r"<(?:!doctype|html|head|body|style|script|form|input|textarea|select|label|section|article|header|footer|nav|main|"
    r"aside|figure|iframe|video|audio|canvas|link|meta)\b|<[a-z][^<>]*\s(?:style|on[a-z]+)=(?!\"text-align)",
    re.IGNORECASE,
)
_ASKED = re.compile(r"html|web ?(?:site|page)|</?[a-z][a-z0-9]*[ >/]|网页|网站", re.IGNORECASE)
# The text of the copy button in a code block's header, left over where the button was removed.
_BARE_COPY_LABEL = re.compile(
    r"<pre>(?:<div[^<>]*>)+(?:[^<>]{0,40}</?(?:span|svg)\b[^<>]*>){0,8}[^<>]{0,40}?Copy code</div>"
)

_ENTITY = re.compile(r"&(amp|lt|gt);")
_CHARACTERS = {"amp": "&", "lt": "<", "gt": ">"}
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)((?:\s+[a-zA-Z-]+(?:=\"[^\"<>]*\")?)*)\s*(/?)>")
_NEVER_ESCAPED = re.compile(r"&(?!(?:amp|lt|gt);)|[<>]")
# The tags that sanitize-html allows by default, and `svg`, which sharegpt.com added.
_ALLOWED_TAGS = frozenset(
    """
    a abbr address article aside b bdi bdo blockquote br caption cite code col colgroup data dd dfn div dl dt em
    figcaption figure footer h1 h2 h3 h4 h5 h6 header hgroup hr i kbd li main mark nav ol p pre q rb rp rt rtc ruby s
    samp section small span strong sub sup svg table tbody td tfoot th thead time tr u ul var wbr
    """.split()
)

_PAGER = re.compile(r"\s*([1-9]\d{0,2}) / ([1-9]\d{0,2})")
# Human turns that were saved without a counter.
_NOT_A_QUESTION = re.compile(r"\s*(?:!?Too many requests|This content may violate)|\s*\Z")


@dataclass
class Evidence:
    """Counts over the sample of one dump."""

    conversations: int = 0
    human_turns: int = 0
    wrapped: int = 0  # conversations with the page's wrapper on an answer: never sanitised
    # Conversations whose answers are what the sanitiser leaves: bare wrappers, and nothing that it removes.
    sanitised: int = 0
    labels: int = 0  # … of these, those with "Copy code" without its button: certainly sanitised
    confirmed: int = 0  # … of these, those with questions that hold entities and nothing that would have been escaped
    contradicted: int = 0  # … of these, those with a question that was never sanitised
    plain_turns: int = 0  # human turns of conversations without an answer that looks like HTML
    plain_bare: int = 0  # … of these, turns that were never sanitised
    plain_escaped: int = 0  # … of these, turns that hold entities and nothing that the sanitiser would have escaped
    pager_turns: int = 0  # human turns that begin like a branch counter
    pager_conversations: int = 0  # conversations of two or more questions, all of which begin so
    pager_mixed: int = 0  # conversations of two or more questions, only some of which begin so
    unwrapped: int = 0  # answers without a wrapper
    block_answers: int = 0  # … of these, answers that are the content of a page's wrapper: blocks that markdown has
    block_conversations: int = 0  # conversations with such an answer
    block_asked: int = 0  # … of these, those with a question that speaks of HTML


@dataclass(frozen=True)
class EraDecision:
    """What was decided for a dump; `conversations_in` applies it to each of its conversations."""

    name: str = "auto"  # one of ERAS
    bare_is_sanitised: bool = False  # answers in bare wrappers mean that the questions are escaped
    fragments_are_html: bool = False  # so do answers that begin with a block such as <p>, without a wrapper
    blocks_are_html: bool = False  # answers that are a wrapper's content are HTML; the questions need not be escaped
    all_escaped: bool = False  # questions are escaped even where the answers are not HTML
    pager: bool = False  # what looks like a branch counter is one, even where the conversation has a single question
    reasons: tuple[str, ...] = ()  # of the decision, for people
    evidence: dict[str, int] = field(default_factory=dict)  # the counts behind it

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as report.json states it."""
        return asdict(self)


UNDECIDED = EraDecision()  # for a conversation that is read without its dump


def decide(evidence: Evidence, name: str = "auto") -> EraDecision:
    """Decide the eras of a dump, from evidence or, unless `name` is "auto", as the user says.

    The thresholds err towards leaving text alone.
    """
    if name != "auto":
        escaped = name.startswith("escaped")
        pager = name in ("before", "escaped_pager")
        said = (f"--era {name}: not decided from evidence",)
        return EraDecision(name, escaped, escaped, False, escaped, pager, said, asdict(evidence))
    e = evidence
    # A tool other than sharegpt.com may have dropped the classes; then some questions hold a bare `<`.
    bare = e.confirmed >= 3 and e.contradicted * 10 <= e.confirmed
    fragments = bare and e.confirmed >= 10
    all_escaped = e.plain_escaped >= 10 and e.plain_bare == 0
    pager = e.pager_conversations >= 3 and e.pager_mixed * 10 <= e.pager_conversations
    # 5 to 11 % of ordinary conversations speak of HTML, and nearly all of those in which HTML was asked for.
    blocks = e.block_conversations >= 10 and e.block_answers >= 0.9 * e.unwrapped
    blocks = blocks and e.block_asked <= 0.25 * e.block_conversations
    reasons = (
        f"{e.wrapped:,} of {e.conversations:,} conversations have the page's wrapper: their text is verbatim",
        f"{e.sanitised:,} have answers as the sanitiser left them; of these {e.labels:,} have a label without its button "
        f"(certain), {e.confirmed:,} have questions with entities only, {e.contradicted:,} questions that were never "
        f"sanitised: bare wrappers are {'taken' if bare else 'not taken'} as proof of escaped text",
        f"of {e.plain_turns:,} human turns beside answers that are not HTML, {e.plain_escaped:,} hold entities and nothing "
        f"unescaped, {e.plain_bare:,} a bare &, < or >: they are {'unescaped' if all_escaped else 'left alone'}",
        f"in {e.pager_conversations:,} conversations every one of several questions begins with a branch counter, in "
        f"{e.pager_mixed:,} only some: a single question's counter is {'removed' if pager else 'left alone'}",
        f"{e.block_answers:,} of {e.unwrapped:,} answers without the page's wrapper look like its content, in "
        f"{e.block_conversations:,} conversations, of which {e.block_asked:,} speak of HTML: such answers are "
        f"{'converted' if blocks else 'left alone'}",
    )
    return EraDecision("auto", bare, fragments, blocks, all_escaped, pager, reasons, asdict(evidence))


def survey(conversations: Iterable[RawConversation]) -> Evidence:
    """Count the evidence in conversations as they were shared, before `apply_era`."""
    evidence = Evidence()
    for conversation in conversations:
        _count(conversation.turns, evidence)
    return evidence


def _count(turns: list[Turn], evidence: Evidence) -> None:
    questions = [turn.text for turn in turns if turn.role == "user"]
    answers = [turn.text for turn in turns if turn.role == "assistant" and turn.text.strip()]
    bare = sum(map(never_sanitised, questions))
    escaped = sum(bool(_ENTITY.search(text)) and not never_sanitised(text) for text in questions)
    evidence.conversations += 1
    evidence.human_turns += len(questions)
    evidence.wrapped += any(map(_PAGE_WRAPPER.match, answers))
    evidence.unwrapped += sum(not (_PAGE_WRAPPER.match(text) or _BARE_WRAPPER.match(text)) for text in answers)
    if blocks := sum(map(is_wrapper_content, answers)):
        evidence.block_answers += blocks
        evidence.block_conversations += 1
        evidence.block_asked += any(map(_ASKED.search, questions))
    if not any(map(_FRAGMENT.match, answers)):
        evidence.plain_turns += len(questions)
        evidence.plain_bare += bare
        evidence.plain_escaped += escaped
    if looks_sanitised(answers, fragments=False):
        evidence.sanitised += 1
        evidence.labels += has_bare_label(answers)
        evidence.confirmed += bool(escaped) and not bare
        evidence.contradicted += bool(bare)
    questions = [text for text in questions if not _NOT_A_QUESTION.match(text)]
    begin = sum(after_pager(text) is not None for text in questions)
    evidence.pager_turns += begin
    if len(questions) > 1 and begin:
        evidence.pager_conversations += all_have_pagers(questions)
        evidence.pager_mixed += not all_have_pagers(questions)


def apply_era(conversation: RawConversation, era: EraDecision) -> None:
    """Mark the answers that are HTML, and undo what sharegpt.com did to the questions, in place."""
    turns = conversation.turns
    # On a saved page of sharegpt.com, only the sanitiser can have dropped the classes.
    if _is_escaped(turns, era, conversation.format == "sharegpt_page"):
        _mark_fragments(turns)
        _unescape(conversation)
    else:
        mark_html(turns)
        if era.blocks_are_html:
            _mark_blocks(turns)
        left = sum(turn.role == "user" and bool(_ENTITY.search(turn.text)) for turn in turns)
        conversation.notes["questions with entities, left alone"] += left
    _remove_pagers(conversation, era)


def _is_escaped(turns: list[Turn], era: EraDecision, from_sharegpt: bool) -> bool:
    if era.name != "auto":
        return era.name.startswith("escaped")
    answers = [turn.text for turn in turns if turn.role == "assistant" and turn.text.strip()]
    if looks_sanitised(answers, era.fragments_are_html):
        escaped = era.bare_is_sanitised or from_sharegpt or has_bare_label(answers)
    else:
        escaped = era.all_escaped and not any(map(_FRAGMENT.match, answers))
    return escaped and not any(turn.role == "user" and never_sanitised(turn.text) for turn in turns)


def mark_html(turns: list[Turn]) -> None:
    """Set `html` on the assistant turns that are HTML of the page.

    These are the answers in the page's own wrapper, which is certain evidence. An answer in a bare `<div>` that begins with
    a block is one too, if every answer of the conversation that is not empty has one wrapper or the other.
    """
    answers = [turn for turn in turns if turn.role == "assistant" and turn.text.strip()]
    certain = [bool(_PAGE_WRAPPER.match(turn.text)) for turn in answers]
    bare = [not is_certain and bool(_BARE_WRAPPER.match(turn.text)) for turn, is_certain in zip(answers, certain)]
    bare_is_page = all(c or b for c, b in zip(certain, bare))
    for turn, is_certain, is_bare in zip(answers, certain, bare):
        turn.html = is_certain or (is_bare and bare_is_page)


def _mark_fragments(turns: list[Turn]) -> None:
    """Set `html` on the answers of a sanitised conversation that begin and end like HTML."""
    for turn in turns:
        if turn.role == "assistant":
            sanitised = _FRAGMENT.match(turn.text) is not None and not never_sanitised(turn.text)
            turn.html = sanitised or bool(_PAGE_WRAPPER.match(turn.text))


def _mark_blocks(turns: list[Turn]) -> None:
    """Set `html` on the answers that are the content of a wrapper."""
    for turn in turns:
        turn.html = turn.html or (turn.role == "assistant" and is_wrapper_content(turn.text))


def looks_like_html(text: str) -> bool:
    """Tell whether text begins and ends with a tag, or holds the page's wrapper anywhere and no code block.

    This is too little evidence to convert the text, but enough to count it.
    """
    if "<div" in text and "```" not in text and _WRAPPER_ANYWHERE.search(text):
        return True
    return re.match(r"\s*<[a-z][a-z0-9]*[ >]", text) is not None and text.rstrip().endswith(">")


def is_wrapper_content(text: str) -> bool:
    """Tell whether text begins and ends with blocks that markdown has, and holds no tag that markdown does not have."""
    return _BLOCKS.match(text) is not None and not _OWN_HTML.search(text)


def _unescape(conversation: RawConversation) -> None:
    """Unescape the questions once: what is now `&amp;lt;` was typed as `&lt;`."""
    for turn in conversation.turns:
        if turn.role == "user":
            text = _ENTITY.sub(lambda match: _CHARACTERS[match[1]], turn.text)
            conversation.notes["unescaped questions"] += text != turn.text
            turn.text = text


def looks_sanitised(answers: list[str], fragments: bool) -> bool:
    """Tell whether all answers are HTML that the sanitiser can have written, and one shows that it did.

    A bare wrapper or a bare label shows it; with `fragments`, no such sign is needed.
    """
    # The wrapper is tested first, because it is at the beginning of the text, while a fragment is matched to its end.
    if not answers or any(map(_PAGE_WRAPPER.match, answers)) or not all(map(_FRAGMENT.match, answers)):
        return False
    shows = fragments or any(map(_BARE_WRAPPER.match, answers)) or has_bare_label(answers)
    return shows and not any(map(never_sanitised, answers))


def has_bare_label(answers: list[str]) -> bool:
    """Tell whether an answer has the label of the copy button without the button, which the sanitiser removes."""
    return any(map(_BARE_COPY_LABEL.search, answers))


def never_sanitised(text: str) -> bool:
    """Tell whether `text` cannot come from the sanitiser: it holds a forbidden tag, or a bare `&`, `<` or `>`."""
    if not _NEVER_ESCAPED.search(text):
        return False
    for closing, name, _, slash in _TAG.findall(text):
        is_void = name in ("br", "hr")  # the sanitiser writes <br />
        if name not in _ALLOWED_TAGS or (is_void and not slash and not closing):
            return True
    return bool(_NEVER_ESCAPED.search(_TAG.sub("", text)))


def after_pager(text: str) -> int | None:
    """Return the position at which the text continues after a branch counter, or None if it does not begin with one.

    "1 / 15 apples" is the counter "1 / 1" and the text "5 apples". The text follows without a space. As ten branches are
    rare, the number of branches gets as few digits as possible, but is never less than the branch's own number.
    """
    match = _PAGER.match(text)
    if match is None:
        return None
    branch, digits = int(match[1]), match[2]
    length = next((n for n in range(1, len(digits) + 1) if int(digits[:n]) >= branch), None)
    return None if length is None else match.start(2) + length


def all_have_pagers(questions: list[str]) -> bool:
    """Tell whether every question begins with a counter, and in at least half of them the text follows without a space.

    The second condition excludes questions such as "1 / 2 cups of flour".
    """
    ends = [after_pager(text) for text in questions]
    if not ends or None in ends:
        return False
    return 2 * sum(text[end : end + 1] != " " for text, end in zip(questions, ends)) >= len(ends)


def _remove_pagers(conversation: RawConversation, era: EraDecision) -> None:
    """Remove the branch counters if every question begins with one; for a single question, only if the dump confirms it."""
    questions = [t for t in conversation.turns if t.role == "user" and not _NOT_A_QUESTION.match(t.text)]
    known = era.name in ("auto", "before", "escaped_pager") and (len(questions) > 1 or era.pager)
    if known and all_have_pagers([turn.text for turn in questions]):
        for turn in questions:
            turn.text = turn.text[after_pager(turn.text) :]
        conversation.notes["branch counters removed"] += len(questions)
    else:
        left = sum(after_pager(turn.text) is not None for turn in questions)
        conversation.notes["questions that begin like a branch counter, left alone"] += left
