"""A real browser that looks at served pages: Debian's chromium, driven by playwright."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from helpers.pages import CHROMIUM


@contextlib.contextmanager
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()


@dataclass
class Visit:
    """An open page, and what happened there that should not: errors of its scripts, requests to other hosts, dialogs."""

    page: object
    home: str
    wrong: list[str] = field(default_factory=list)
    expected: str | None = None
    """A part of the one question that the page may ask; it is answered with yes."""

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def ask(self, text: str) -> None:
        box = self.page.get_by_label("Your message", exact=True)
        box.fill(text)
        box.press("Enter")

    def answers(self):
        return self.page.locator("article.answer")

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True)


@contextlib.contextmanager
def visit(browser, home: str, **context) -> Iterator[Visit]:
    """A page in a profile of its own. At the end, nothing must have gone wrong there."""
    profile = browser.new_context(**context)
    page = profile.new_page()
    page.set_default_timeout(30_000)
    made = Visit(page, home)
    own = urlsplit(home).netloc

    def on_request(request) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("blob", "data") and url.netloc != own:
            made.wrong.append(f"asked {request.url}")

    def on_dialog(dialog) -> None:
        if made.expected and made.expected in dialog.message:
            return dialog.accept()
        made.wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("request", on_request)
    page.on("pageerror", lambda error: made.wrong.append(str(error)))
    page.on("console", lambda said: "Refused" in said.text and made.wrong.append(said.text))
    page.on("dialog", on_dialog)
    try:
        page.goto(home)
        page.get_by_role("tab", name="Chat").wait_for()
        yield made
        assert not made.wrong
    finally:
        profile.close()
