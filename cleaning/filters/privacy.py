"""Mask personal data and secrets in every turn (`--mask_pii`) by fixed patterns; names and postal addresses are not found.

    [EMAIL]  [PHONE]  [IP]  [KEY]  [PRIVATE_KEY]

A mask is a word in brackets. It fits anywhere in a text, and is a legal list in most programming languages. It matches none
of the patterns, so masking twice changes nothing. Public values are kept: addresses at example.com, private
and reserved IP ranges, version numbers, 555 numbers. Telephone numbers are not searched for in code, where most long numbers
are something else. No complaint, message or log shows what was found.
"""

import ipaddress
import re

from cleaning.settings import FilterSettings
from fastft.data.conversation import Message

# A private key that was pasted without its last line is taken to end where prose begins.
_PEM = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]*?"
    r"(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|(?=\n[ \t]?\n[^\n ]{1,40} [^\n ]{1,40} )|\Z)"
)
_KEYS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{40,255}"
    r"|glpat-[A-Za-z0-9_-]{20,}"  # GitLab
    r"|sk-(?:proj-|svcacct-|admin-|ant-|or-)?[A-Za-z0-9_-]{20,}"  # OpenAI and those who copied its form
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"  # Stripe
    r"|hf_[A-Za-z0-9]{30,}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}"  # Slack
    r"|AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{30,}"  # Google
    r"|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"  # SendGrid
    r"|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,}|dop_v1_[a-f0-9]{64}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"  # JSON Web Token
    r"|\d{8,10}:AA[A-Za-z0-9_-]{33}"  # Telegram
    r")(?![A-Za-z0-9])"
    # AWS secrets have no form of their own: they are recognised by the name before them.
    r"|(?<=[=:\s\"'])(?:(?<=secret_access_key=)|(?<=secret_access_key = )|(?<=SecretAccessKey\": \")"
    r"|(?<=SECRET_ACCESS_KEY=)|(?<=SECRET_ACCESS_KEY = ))[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"
)
# Other keys have no form of their own: they are recognised by the name before them, and by a digit, which words lack.
_NAMED_KEY = re.compile(
    r"((?:api|secret|access|auth|private)[_-]?(?:key|token|secret)[\"']?\s{0,3}[=:]\s{0,3}[\"']?)"
    r"(?=[A-Za-z_/+-]*\d)[A-Za-z0-9_/+-]{20,}(?![A-Za-z0-9_/+.(\[-])",
    re.IGNORECASE,
)
# Sample keys of documentation, which are not secrets.
_SAMPLE = re.compile(r"example|your|xxxx|0000000|1234567890|abcdefgh|\.\.\.", re.IGNORECASE)

_EMAIL = re.compile(
    r"(?<![\wÀ-ɏ.+%-])(?<![A-Za-z]')[A-Za-z0-9À-ɏ](?:[A-Za-z0-9À-ɏ._%+'-]{0,62}[A-Za-z0-9À-ɏ_+-])?@"
    r"((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24})(?![\w@-]|\.[A-Za-z])",
    re.ASCII,  # Chinese has no spaces around an address; its characters are no part of it
)
_PUBLIC_DOMAIN = re.compile(
    r"(?:.*\.)?(?:example(?:\.\w+)*|(?:your|my|some|test)[\w-]*\.\w+|domain\.com|company\.com|test|invalid|localhost|local|"
    r"email\.com|mail\.com|emailaddress\.com|contoso\.com|fabrikam\.com)",
    re.IGNORECASE,
)
_PUBLIC_NAME = re.compile(r"(?:git|noreply|no-reply|user|username|name|email|your[\w.-]*|foo|bar)@", re.IGNORECASE)

_IPV4 = re.compile(r"(?<![\w.:/-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:.]*\w)", re.ASCII)
_VERSION_BEFORE = re.compile(
    r"(?:version|release|ver\.?|v|build|firmware|section|chapter|==|>=|~=)\s*\Z", re.IGNORECASE
)

_PHONE = re.compile(
    r"(?<![\w.+/=#:@-])(?<!\d[ ,])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"  # +49 30 1234567
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[-.]\d{3}[-.]\d{4}"  # North America
    r"|1[3-9]\d{9}"  # China, mobile
    r"|0\d{1,4}[-/ ]\d{3,4}[- ]?\d{3,5}"  # national, with trunk 0
    r")(?![\w@/-]|[.,]\d)",
    re.ASCII,
)
_CODE = re.compile(r"^[ \t>]*(`{3,}|~{3,})[\s\S]*?(?:^[ \t>]*\1[^\n]*|\Z)|`[^`\n]+`", re.MULTILINE)


def mask_keys(messages: list[Message], settings: FilterSettings) -> int:
    return _mask(messages, _masked_keys)


def mask_emails(messages: list[Message], settings: FilterSettings) -> int:
    return _mask(messages, _masked_emails)


def mask_ips(messages: list[Message], settings: FilterSettings) -> int:
    return _mask(messages, _masked_ips)


def mask_phones(messages: list[Message], settings: FilterSettings) -> int:
    return _mask(messages, _masked_phones)


def mask_text(text: str) -> str:
    """Return `text` with everything masked, for examples in a report."""
    for masked in (_masked_keys, _masked_emails, _masked_ips, _masked_phones):
        text, _ = masked(text)
    return text


def _mask(messages: list[Message], masked) -> int:
    total = 0
    for message in messages:
        message.content, count = masked(message.content)
        total += count
    return total


def _masked_keys(text: str) -> tuple[str, int]:
    text, blocks = _PEM.subn("[PRIVATE_KEY]", text) if "PRIVATE KEY" in text else (text, 0)
    text, keys = _replace(_KEYS, "[KEY]", text, lambda found: not _SAMPLE.search(found[0]))
    named = 0
    for found in reversed(list(_NAMED_KEY.finditer(text))):
        if not _SAMPLE.search(found[0]):
            text, named = f"{text[: found.end(1)]}[KEY]{text[found.end() :]}", named + 1
    return text, blocks + keys + named


def _masked_emails(text: str) -> tuple[str, int]:
    if "@" not in text:
        return text, 0
    return _replace(_EMAIL, "[EMAIL]", text, _is_private_address)


def _is_private_address(found: re.Match) -> bool:
    return not _PUBLIC_DOMAIN.fullmatch(found[1]) and not _PUBLIC_NAME.match(found[0])


def _masked_ips(text: str) -> tuple[str, int]:
    text, fours = _replace(_IPV4, "[IP]", text, _is_public_ip) if "." in text else (text, 0)
    text, sixes = _replace(_IPV6, "[IP]", text, _is_public_ip) if text.count(":") > 1 else (text, 0)
    return text, fours + sixes


# Public name servers and sample addresses that manuals use.
_WELL_KNOWN = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "1.2.3.4", "4.4.4.4", "2.2.2.2", "3.3.3.3"}


def _is_public_ip(found: re.Match) -> bool:
    """Tell whether a match is the address of a host on the internet. One that ends in .0 may be a version number and is not."""
    if (
        found[0] in _WELL_KNOWN
        or found[0].endswith(".0")
        or _VERSION_BEFORE.search(found.string[: found.start()][-12:])
    ):
        return False
    if ":" in found[0] and len([group for group in found[0].split(":") if group]) < 4:
        return False  # a[::5] and 12:30:45 are not addresses
    try:
        return ipaddress.ip_address(found[0]).is_global
    except ValueError:
        return False


def _masked_phones(text: str) -> tuple[str, int]:
    """Mask telephone numbers outside code."""
    parts, total, done = [], 0, 0
    for code in _CODE.finditer(text):
        prose, count = _replace(_PHONE, "[PHONE]", text[done : code.start()], _is_phone)
        parts += [prose, code[0]]
        total, done = total + count, code.end()
    prose, count = _replace(_PHONE, "[PHONE]", text[done:], _is_phone)
    return "".join([*parts, prose]), total + count


def _is_phone(found: re.Match) -> bool:
    digits = re.sub(r"\D", "", found[0])
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2 and not re.search(r"(?:^|\D)555(?:\D|$)", found[0])


def _replace(pattern: re.Pattern, mask: str, text: str, is_meant) -> tuple[str, int]:
    count = 0

    def replacement(found: re.Match) -> str:
        nonlocal count
        if not is_meant(found):
            return found[0]
        count += 1
        return mask

    before = -1
    # Of two matches without a space between them, the second is found only after the first has been masked.
    while count != before:
        before, text = count, pattern.sub(replacement, text)
    return text, count
