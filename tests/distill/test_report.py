"""The page: it shows the ledger's numbers, everything on it is escaped, and it fits narrow and wide screens, light and dark."""

import pytest
from helpers import openai_server
from helpers.distilling import distill, ledger, query, right, settings, write_lines
from helpers.openai_server import completion
from helpers.pages import CHROMIUM, HOSTILE, texts

from fastft import cli
from fastft.distill.report import write_report


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with two teachers, one of each reason, and hostile texts everywhere."""
    place = tmp_path_factory.mktemp("page")
    queries = [query(number, collection=("sums", "more sums")[number % 2]) for number in range(40)]
    queries += [
        {"id": f"h{n}", "collection": "<b>hostile</b>", "query": f"Repeat {n}: {text}"}
        for n, text in enumerate(HOSTILE)
    ]
    write_lines(place / "queries.jsonl", queries)

    def reply(body, number):
        said = body["messages"][-1]["content"]
        if said.startswith("Repeat"):
            return said.partition(": ")[2] + f"\n\nSaid by {body['model']}: " + "and so on " * 40
        if "What is 5 " in said:
            return "I'm sorry, but I cannot help with sums."
        if "What is 6 " in said:
            return completion("Well,", body, "length")
        return "The answer is 1." if "What is 9 " in said else right(body)

    with openai_server.endpoint(reply) as server:
        given = settings(place, server.url, teacher_usd_per_million=[10, 30], verify={"near": 0})
        given["teachers"].append(
            {"name": "second", "url": server.url, "model": "a-big-one", "share": 0.5, "usd_per_million": [100, 300]}
        )
        assert distill(place, **given) == 0
    return place


def test_the_page_says_what_the_ledger_says(run_dir):
    page, found = (run_dir / "run/report.html").read_text(), ledger(run_dir)
    first = found["teachers"][0]
    lede = " ".join(texts(page, "//p[@class='lede']"))
    assert f"{first['kept']:,} of {first['planned']:,} answers of first" in lede and "was spent here" in lede
    assert "unverified: wrong answer" in texts(page, "//th") and "refused: says that it cannot" in texts(page, "//th")
    shown = texts(page, "//section[.//h2='By collection']//tr[td[1]='sums'][td[2]='first']/td")
    sums = first["collections"]["sums"]
    assert shown[2:4] == [str(sums["planned"]), str(sums["kept"])]
    assert any(summary.startswith("first, cut: longer than max_tokens") for summary in texts(page, "//summary"))


def test_the_page_is_made_again_from_the_ledger(run_dir, capsys):
    path = run_dir / "run/report.html"
    before = path.read_bytes()
    path.unlink()
    assert cli.main(["report", str(run_dir / "run")]) == 0
    assert path.read_bytes() == before and str(path) in capsys.readouterr().out


def test_nothing_on_the_page_is_markup_of_others(run_dir):
    page = (run_dir / "run/report.html").read_text()
    assert "<b>hostile" not in page and "alert(1)</script>" not in page.replace("&lt;/script&gt;", "")
    assert not texts(page, "//*[@onerror or @onload or @onmouseover]") and "\x1b" not in page and "\u202e" not in page


def test_a_page_without_answers_can_be_written(run_dir, tmp_path):
    found = ledger(run_dir)
    found["teachers"] = [{**each, "lengths": {}, "examples": {}, "usd_per_kept": None} for each in found["teachers"]]
    write_report(tmp_path / "report.html", {**found, "samples": [], "train_yaml": None, "usd": 0})
    assert "No query is answered." in texts((tmp_path / "report.html").read_text(), "//p")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
@pytest.mark.parametrize("width, scheme", [(1200, "light"), (390, "dark")])
def test_the_page_fits_the_screen(run_dir, tmp_path, width, scheme):
    from helpers.browser import browser

    with browser() as chromium:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page, complaints = context.new_page(), []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto((run_dir / "run/report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("summary").first.click()
        assert page.locator("details[open] .answer").first.is_visible()
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) > 600) == (scheme == "light")
        assert not complaints
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        context.close()
