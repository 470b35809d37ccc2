"""Serve the chat page, whose files in fastft/serve/web need no build step. A strict Content-Security-Policy makes browsers
run and load only what comes from this server, whatever an answer contains.
"""

import base64
import gzip
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "web"
PAGE = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
"""Content types by file ending. Files with other endings are not served."""
POLICY = (
    "default-src 'none'; script-src 'self' {scripts}; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)


@dataclass(frozen=True)
class SiteFile:
    content: bytes
    squeezed: bytes
    headers: dict[str, str]

    def response(self, asked: Iterable[tuple[bytes, bytes]]) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers) for a request with such headers."""
        sent = dict(asked)
        if self.headers["etag"].encode() in sent.get(b"if-none-match", b""):
            return 304, b"", self.headers
        if b"gzip" in sent.get(b"accept-encoding", b""):
            return 200, self.squeezed, self.headers | {"content-encoding": "gzip"}
        return 200, self.content, self.headers


class Site:
    """All files, kept in memory because they change only with a release."""

    def __init__(self) -> None:
        paths = [path for path in FOLDER.rglob("*") if path.suffix in TYPES]
        self.files = {f"/web/{path.relative_to(FOLDER)}": _file(path) for path in paths}
        self.files["/"] = self.files.pop(f"/web/{PAGE}")

    def find(self, path: str) -> SiteFile | None:
        return self.files.get(path)


def _file(path: Path) -> SiteFile:
    content = path.read_bytes()
    headers = {
        "content-type": TYPES[path.suffix],
        "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        "cache-control": "no-cache",  # browsers revalidate their copy each time
        "vary": "accept-encoding",
        "x-content-type-options": "nosniff",
    }
    if path.name == PAGE:
        headers |= {
            "content-security-policy": POLICY.format(scripts=" ".join(_inline_scripts(content))),
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
        }
    return SiteFile(content, gzip.compress(content, 9, mtime=0), headers)


def _inline_scripts(page: bytes) -> list[str]:
    """Hashes of the page's own inline scripts (the import map), which the policy allows."""
    found = re.findall(rb"<script[^>]*>(.+?)</script>", page, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(each).digest()).decode()}'" for each in found]
