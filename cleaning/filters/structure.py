"""Filters and repairs for the shape of a dialogue: who speaks when, error messages instead of turns, pieces, limits."""

import fnmatch
import re
import unicodedata

from cleaning.settings import FilterSettings
from fastft.data.continue_requests import is_continue
from fastft.data.conversation import Conversation, Message

# --- whole conversations ----------------------------------------------------------------------------------------------


def other_model(conversation: Conversation, settings: FilterSettings) -> str | None:
    """Complain about a conversation whose model matches none of the patterns, or that names no model.

    Dumps write `Model: GPT-4`, `gpt-4` and `GPT-4`, so the word "Model:" and case do not count.
    """
    if not settings.models:
        return None
    model = conversation.model.casefold().removeprefix("model:").strip()
    if any(fnmatch.fnmatchcase(model, pattern.casefold().strip()) for pattern in settings.models):
        return None
    return f"model is {conversation.model!r}" if model else "names no model"


_PLUGIN_MODEL = re.compile(r"\b(?:plugins?|browsing|code[ _-]interpreter|advanced[ _-]data[ _-]analysis)\b", re.I)
# What the page wrote above an answer in which a plugin took part: "Used **Wolfram**", "Finished browsing".
_PLUGIN_LINE = re.compile(r"(?:Used \*\*[^*\n]{2,40}\*\*|Finished (?:browsing|working)|Show work)\s*(?:\n|\Z)")


def plugin_session(conversation: Conversation, settings: FilterSettings) -> str | None:
    """Complain about a conversation in which a plugin took part.

    The dump lacks what the plugin returned, and an answer without visible sources teaches a model to invent facts.
    """
    if _PLUGIN_MODEL.search(conversation.model):
        return f"model is {conversation.model!r}"
    for number, message in enumerate(conversation.messages, start=1):
        if message.role == "assistant" and (found := _PLUGIN_LINE.match(message.content)):
            return f"turn {number} begins with {found[0].strip()!r}"
    return None


def tool_session(conversation: Conversation, settings: FilterSettings) -> str | None:
    """Complain about the result of a tool. Calls of tools are found by the readers (`RawConversation.sessions`)."""
    for number, message in enumerate(conversation.messages, start=1):
        if message.role == "tool":
            return f"turn {number} is from a tool"
    return None


def no_question_or_no_answer(conversation: Conversation, settings: FilterSettings) -> str | None:
    """Complain about a conversation from which nothing can be learned. In the files its reason is called `too_short`."""
    roles = [message.role for message in conversation.messages]
    if "assistant" not in roles:
        return "has no answer" if roles else "has no turns"
    if "user" not in roles:
        return "has no question"
    return None


def wrong_role_order(conversation: Conversation, settings: FilterSettings) -> str | None:
    """Complain unless user and assistant take turns, the user first, after an optional system message.

    Where tool sessions are kept, the assistant's turn of a round may be assistant, tool, assistant, …
    """
    messages = conversation.messages
    start = 1 if messages and messages[0].role == "system" else 0
    last = "assistant"
    for number, message in enumerate(messages[start:], start=start + 1):
        expected = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}[last]
        if message.role not in expected or (message.role == "tool" and number == start + 1):
            return f"turn {number} is from {message.role}, expected {expected[0]}"
        last = message.role
    if last == "tool":
        return f"turn {len(messages)}, the last, is from tool, expected assistant"
    return None


def _turns(conversation: Conversation) -> int:
    return sum(message.role in ("user", "assistant") for message in conversation.messages)


def too_few_turns(conversation: Conversation, settings: FilterSettings) -> str | None:
    count = _turns(conversation)
    if settings.min_turns is not None and count < settings.min_turns:
        return f"{count} turns, at least {settings.min_turns} are wanted"
    return None


def too_many_turns(conversation: Conversation, settings: FilterSettings) -> str | None:
    count = _turns(conversation)
    if settings.max_turns is not None and count > settings.max_turns:
        return f"{count} turns, at most {settings.max_turns} are wanted"
    return None


def too_long(conversation: Conversation, settings: FilterSettings) -> str | None:
    if settings.max_chars is None:
        return None
    count = sum(len(message.content) for message in conversation.messages)
    return f"{count:,} characters, at most {settings.max_chars:,} are wanted" if count > settings.max_chars else None


# --- single turns -----------------------------------------------------------------------------------------------------

# What the page showed instead of an answer, and the extension for sharing pages saved as one. Only whole turns count, because
# an answer may well be about such messages.
_BUSY = re.compile(r"!?Too many requests in 1 hour\. Try again later\.")
_BANNERS = (
    re.compile(r"!?Too many requests, please slow down\.?"),
    re.compile(r"Our systems are a bit busy at the moment, please take a break and try again soon\."),
    re.compile(
        r"Only one message at a time\. Please allow any other responses to complete before sending another message.*"
    ),
    re.compile(r"network error\.?", re.IGNORECASE),
    re.compile(r"Something went wrong\.?"),
    re.compile(r"Something went wrong, please try reloading the conversation\."),
    re.compile(r"(?:Something went wrong|An error occurred)\. .*\bhelp\.openai\.com\.?"),
    re.compile(r"There was an error generating a response\.?"),
    re.compile(r"Error in (?:message|body) stream\.?"),
    re.compile(r"The server had an error while processing your request\. Sorry about that!"),
    re.compile(r"You've reached the current usage cap for .{3,40}try again after .{3,20}"),
    re.compile(r"(?:The|This) message you submitted was too long, please reload the conversation.*"),
)


def error_banner(message: Message, settings: FilterSettings) -> str | None:
    """Complain about a turn that is an error message of the page."""
    text = message.content.strip()
    # Of these messages, only "Too many requests" also appeared in place of questions. Users may type the others themselves.
    banners = (_BUSY, *_BANNERS) if message.role == "assistant" else (_BUSY,)
    if len(text) < 400 and any(banner.fullmatch(text) for banner in banners):
        return f"is {text!r}"
    return None


def empty_turn(message: Message, settings: FilterSettings) -> str | None:
    return "is empty" if message.role == "user" and not _visible(message.content) else None


def empty_answer(message: Message, settings: FilterSettings) -> str | None:
    return "is empty" if message.role == "assistant" and not _visible(message.content) else None


def _visible(text: str) -> bool:
    """Tell whether a text has more than white space and invisible characters. (An unfinished answer is one zero-width space.)"""
    return any(not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf") for c in text)


_FENCE = re.compile(r"[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*(`{3,}|~{3,})([^\n]*)")


def open_fence(text: str) -> str:
    """Return the code fence that is open where `text` ends, or "".

    A fence is closed by a line with nothing but a fence of the same kind that is at least as long (CommonMark).
    """
    fence = ""
    if "```" not in text and "~~~" not in text:
        return fence
    for line in text.split("\n"):
        found = _FENCE.match(line) if "```" in line or "~~~" in line else None
        if not found:
            continue
        delimiter, rest = found.groups()
        if not fence:
            fence = "" if "`" in rest and delimiter[0] == "`" else delimiter  # ```x``` is inline code
        elif delimiter[0] == fence[0] and len(delimiter) >= len(fence) and not rest.strip():
            fence = ""
    return fence


# What the page wrote below the part of an answer that had arrived. The text before it must end in the middle of a sentence:
# an answer may also be about such messages.
_CUT_BY_ERROR = re.compile(r"[^\s.!?:;…。！？：]\s*\n\n(network error|There was an error generating a response)\s*\Z")


def unfinished_answer(message: Message, settings: FilterSettings) -> str | None:
    """Complain about an answer that was cut by an error or inside a code block, because it teaches to stop there.

    Where the dump itself says that the answer is cut (`ends` false), its end is not learned, so an open block does no harm.
    """
    if message.role != "assistant":
        return None
    end = message.content[-80:]
    if "error" in end and (found := _CUT_BY_ERROR.search(end)):
        return f"was cut: {found[1]!r}"
    return "ends inside a code block" if message.ends and open_fence(message.content) else None


def orphan_continue(message: Message, settings: FilterSettings) -> str | None:
    """Complain about a dialogue that begins with `continue`, because the answer to be continued is missing."""
    return f"only says {message.content.strip()!r}" if message.role == "user" and is_continue(message.content) else None


# --- repairs ----------------------------------------------------------------------------------------------------------


def drop_leading_assistant(messages: list[Message], settings: FilterSettings) -> int:
    """Drop answers before the first question: an answer without its question teaches nothing."""
    begin = end = 1 if messages and messages[0].role == "system" else 0
    while end < len(messages) and messages[end].role in ("assistant", "tool"):
        end += 1
    del messages[begin:end]
    return end - begin


def merge_assistant_turns(messages: list[Message], settings: FilterSettings) -> int:
    """Merge answers in a row into one with a blank line between them, because the page saved continued answers like this.

    After an answer that its dump calls cut, the next is appended directly. If either is not to be learned, the whole is not.
    With `consecutive` "last", only the last is kept, because other pages saved every regenerated answer.
    """
    merged: list[Message] = []
    for message in messages:
        if message.role == "assistant" and merged and merged[-1].role == "assistant":
            if settings.consecutive == "last":
                merged[-1] = message
            else:
                before = merged[-1]
                between = "\n\n" if before.ends and before.content and message.content else ""
                before.content += between + message.content
                before.train, before.ends = before.train and message.train, message.ends
        else:
            merged.append(message)
    count = len(messages) - len(merged)
    messages[:] = merged
    return count


def trim_last_question(messages: list[Message], settings: FilterSettings) -> int:
    """Drop questions at the end that were never answered. A conversation without any answer is left to `too_short`.

    A tool's result at the end, which no answer follows, is dropped too; the conversation then ends with the call.
    """
    count = 0
    while messages and messages[-1].role in ("user", "tool") and any(m.role == "assistant" for m in messages):
        messages.pop()
        count += 1
    return count


_RETRY = re.compile(
    r"(?:please |pls )?(?:try (?:it )?again|again|retry|regenerate)(?: please)?"
    r"|再试一次|重试|noch ?mal|reintenta|réessaie|もう一度|ещё раз|еще раз|다시",
    re.IGNORECASE,
)


def leans_on_the_answer_before(text: str) -> bool:
    """Tell whether a question is a `continue` or `try again`, which has no meaning without the round before it."""
    return is_continue(text) or _RETRY.fullmatch(text.strip(" \t\r\n.,!?…。！？")[:61]) is not None


def merge_continued_answers(messages: list[Message], settings: FilterSettings) -> int:
    """Merge an answer that was cut, the `continue` after it and the other half into one answer, where that is certain.

    A `continue` after an answer that was complete asks for more, and remains a round of its own.
    """
    merged: list[Message] = []
    position = count = 0
    while position < len(messages):
        question, answer = messages[position], messages[position + 1 : position + 2]
        if (
            answer
            and (question.role, answer[0].role) == ("user", "assistant")
            and merged
            and merged[-1].role == "assistant"
            and is_continue(question.content)
            and merged[-1].train == answer[0].train
            and (whole := joined(merged[-1].content, answer[0].content)) is not None
        ):
            merged[-1].content, merged[-1].ends = whole, answer[0].ends
            position += 2
            count += 1
            continue
        merged.append(question)
        position += 1
    messages[:] = merged
    return count


_REOPENED = re.compile(r"[ \t]*(?:`{3,}|~{3,})[^\n`]*\n")
_LIST_ITEM = re.compile(r"^[ \t]*(\d{1,4})[.)][ \t]", re.MULTILINE)
_LAST_WORD = re.compile(r"[^\W\d_]+\Z")
_FIRST_WORD = re.compile(r"[^\W\d_]+")
_NO_SPACES = re.compile("[\u3040-\u30ff\u3400-\u9fff，、]")  # Chinese and Japanese


def joined(first: str, second: str) -> str | None:
    """Return the two halves of an answer joined, or None if it is not certain how they belong together.

    The page does not say whether an answer was cut inside a word, after a word, or at the end of a line. So only certain
    cases are joined: code at the end of a line, the next number of a list, and a sentence that continues in lower case where
    the rest of the text contains the words around the cut.
    """
    at_line_end = first.endswith("\n")
    first, second = first.rstrip(), second.strip("\n")
    if not first or not second.strip():
        return None
    if open_fence(first):
        return _joined_code(first, second) if at_line_end or first[-1] in ";{}:,)]>" else None
    items, next_item = _LIST_ITEM.findall(first[-4_000:]), _LIST_ITEM.match(second)
    if items and next_item:
        return first + "\n" + second if int(next_item[1]) == int(items[-1]) + 1 else None
    return _joined_sentence(first, second.lstrip())


def _joined_code(first: str, second: str) -> str | None:
    if reopened := _REOPENED.match(second):
        return first + "\n" + second[reopened.end() :]
    # The code continues without a fence of its own: then the second half must close the fence.
    whole = first + "\n" + second
    return None if open_fence(whole) or not open_fence(second) else whole


def _joined_sentence(first: str, second: str) -> str | None:
    if first[-1] in "，、" or (_NO_SPACES.match(first[-1]) and len(first) - first.rfind("\n") > 20):
        return first + second if _NO_SPACES.match(second) and not _begins_anew(second) else None
    if not second[0].islower():
        return None
    if first[-1] in ",;":
        return first + " " + second
    last, next_ = _LAST_WORD.search(first), _FIRST_WORD.match(second)
    if not last or not next_:
        return None
    known = {word.lower() for word in _FIRST_WORD.findall(first[: last.start()] + " " + second[next_.end() :])}
    if (last[0] + next_[0]).lower() in known:
        return first + second  # the cut is inside of a word: "Tw", "ain"
    return first + " " + second if last[0].lower() in known and next_[0].lower() in known else None


def _begins_anew(text: str) -> bool:
    """Tell whether the second half begins with a new sentence, such as an apology."""
    return re.match(r"好的|当然|以下|抱歉|对不起|接下来|はい|申し訳|続き", text) is not None
