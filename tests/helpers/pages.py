"""What tests of HTML pages share: hostile texts, a browser, the texts of a page, and rows of a run's metrics."""

import random
import shutil
import subprocess

from lxml import html as lxml_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rows(count: int, eval_every: int = 0) -> list[dict]:
    """Return the rows of metrics.jsonl for so many steps, with a falling loss."""
    noise, out = random.Random(0), []
    for step in range(1, count + 1):
        out.append(
            {"step": step, "epoch": 3 * step / count, "loss": 5 / step**0.5 + noise.random(), "lr": 2e-5 * step / count}
        )
        out[-1] |= {"grad_norm": noise.random(), "tokens": 900, "trained_tokens": 600, "padding_tokens": 100}
        out[-1] |= {"tokens_per_s": 9000 + noise.random(), "step_time_s": 0.1, "mfu": None}
        if eval_every and step % eval_every == 0:
            out.append({"step": step, "eval_loss": 1 + 5 / step**0.5})
    return out


def texts(page: str, xpath: str) -> list[str]:
    """Return the text of every element that `xpath` finds, with single spaces."""
    return [" ".join(" ".join(element.itertext()).split()) for element in lxml_html.fromstring(page).xpath(xpath)]


HOSTILE = [
    "<script>alert(1)</script>",
    "</script></style></title><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "{{ 7 * 7 }}{% raw %}${7*7}",
    "<!-- ]]> <svg/onload=alert(1)>",
    "```\n<script>alert(1)</script>\n```",
    "&lt;b&gt; &amp;",
    "\x00\x1b[31m\x7f\x85\u202eevil\u2066\ufeff\ud800\U000e0041\uffff\r\n\rend",
]


def browse(tmp_path, page: str, fragment: str = "") -> tuple[str, list[str]]:
    """Return the page's DOM after its script has run, and the browser's complaints."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    command = [CHROMIUM, *flags, "--enable-logging=stderr", "--dump-dom", (tmp_path / "page.html").as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
