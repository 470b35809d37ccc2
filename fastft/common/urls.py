"""Reads the URLs of endpoints."""

from urllib.parse import SplitResult, urlsplit


def parse_http(url: str) -> SplitResult | None:
    """The parts of an http(s) URL to which requests can be sent; None for any other text."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is no number or too large, or a bracket is missing
        return None
    return parts if valid else None
