"""Side by side, the arena and the leaderboard in a real browser: names stay hidden, a vote lands once, failures are no battle."""

import re

import pytest
from helpers import gateways
from helpers.browser import visit
from helpers.pages import CHROMIUM
from helpers.serving import wait_until

from fastft.serve.gateway.events import read_votes

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = playwright.expect
expect.set_options(timeout=30_000)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look with")]

NAMES = ("osprey-instruct", "kestrel-instruct")
QUICK = ["--check_s", "0.3", "--silence_s", "30"]


@pytest.fixture(scope="module")
def workers():
    with gateways.scripted(NAMES[0]) as one, gateways.scripted(NAMES[1]) as other:
        yield one, other


@pytest.fixture(scope="module")
def running(workers, tmp_path_factory):
    directory = tmp_path_factory.mktemp("arena")
    config = {"workers": [{"url": each.entry} for each in workers], "record": str(directory / "record")}
    with gateways.gateway(*QUICK, config=config, directory=directory) as process:
        process.record, process.home = directory / "record", process.url.removesuffix("v1")
        yield process


@pytest.fixture
def page(chromium, running, workers):
    for number, worker in enumerate(workers):
        worker.do(words=f"answer number {number}")
    with visit(chromium, running.home + "#arena") as visited:
        yield visited


def votes(running) -> list[dict]:
    return list(read_votes(running.record))


def vote_buttons(page):
    return page.page.get_by_role("group", name="Your vote").get_by_role("button")


def ask_both(page, text: str = "which?") -> None:
    page.ask(text)
    expect(page.button("Tie")).to_be_enabled()


def test_names_are_hidden_from_page_and_network_until_the_vote(page, running):
    before = len(votes(running))
    page.page.evaluate(
        """() => {
            window.heard = [];
            const plain = window.fetch;
            window.fetch = async (...given) => {
                const response = await plain(...given);
                if (String(given[0]).startsWith("arena/battles"))
                    response.clone().text().then((text) => heard.push(JSON.stringify([...response.headers]) + text));
                return response;
            };
        }"""
    )
    ask_both(page)
    expect(page.answers().locator(".who")).to_have_text(["Model A", "Model B"])
    seen = page.page.get_by_role("tabpanel").inner_text()
    wait_until(lambda: page.page.evaluate("heard.length") == 3, "all that was sent has been heard")
    heard = page.page.evaluate("heard")
    assert not any(name in text for name in NAMES for text in [*heard, seen])
    assert "answer number 0" in seen and "answer number 1" in seen
    page.button("A is better").click()
    expect(page.page.locator(".verdict")).to_contain_text("Your vote counts.")
    shown = page.answers().locator(".who").all_inner_texts()
    assert sorted(text[3:] for text in shown) == sorted(NAMES)
    [vote] = votes(running)[before:]
    events = {event["id"]: event for event in gateways.events(running.record)}
    for side in "ab":
        [event] = [events[each] for each in vote["turns"][side]]
        assert event["model"] == vote["models"][side] == dict(zip("ab", shown))[side][3:]
        assert event["battle"] == {"id": vote["battle"], "side": side, "anonymous": True, "drawn_from": list(NAMES)}
        assert event["answers"][0]["content"] in seen
    assert (vote["winner"], vote["counted"]) == ("a", True)


def test_a_vote_lands_once_whatever_is_clicked_and_survives_a_reload(page, running):
    before = len(votes(running))
    ask_both(page)
    page.button("B is better").dblclick(force=True)
    expect(page.page.locator(".verdict")).to_be_visible()
    said = page.page.locator(".verdict p").inner_text()
    expect(vote_buttons(page)).to_have_count(0)
    page.page.reload()
    expect(page.page.locator(".verdict p")).to_have_text(said)
    expect(page.answers()).to_have_count(2)
    expect(vote_buttons(page)).to_have_count(0)
    assert page.page.get_by_label("Your message", exact=True).is_disabled()
    [vote] = votes(running)[before:]
    again = running.post(f"/arena/battles/{vote['battle']}/vote", {"winner": "a"})
    assert again.json["winner"] == "b" and len(votes(running)) == before + 1
    page.page.locator(".verdict").get_by_role("button", name="New round").click()
    expect(page.answers()).to_have_count(0)


def test_a_vote_is_taken_back_and_counts_no_more(page, running):
    ask_both(page)
    page.button("Tie").click()
    page.button("Take it back").click()
    expect(page.page.locator(".verdict")).to_contain_text("taken back and does not count")
    first, second = votes(running)[-2:]
    assert first["battle"] == second["battle"]
    assert (first["winner"], second["winner"], second["counted"]) == ("tie", "withdrawn", False)


def test_nobody_votes_before_both_have_answered_and_a_failed_side_is_no_battle(page, running, workers):
    before = len(votes(running))
    workers[0].do(words="quick")
    workers[1].do(die_after=1, chunks=3, delay_s=1)
    page.ask("which?")
    expect(page.page.get_by_role("tabpanel")).to_contain_text("quick")
    for button in ("A is better", "B is better", "Tie", "Both are bad"):
        expect(page.button(button)).to_be_disabled()
    expect(page.page.locator(".trouble")).to_contain_text("The worker that was writing this answer is gone.")
    expect(page.button("Tie")).to_be_disabled()
    workers[1].do(words="better late")
    page.button("Retry").click()
    expect(page.button("Tie")).to_be_enabled()
    expect(page.page.get_by_role("tabpanel")).to_contain_text("better late")
    assert len(votes(running)) == before


def test_an_answer_that_names_its_model_makes_the_vote_not_count(page, running, workers):
    workers[0].do(words="As Osprey, I cannot say.")
    ask_both(page)
    page.button("A is better").click()
    expect(page.page.locator(".verdict")).to_contain_text("does not count: an answer names a model")
    assert votes(running)[-1]["counted"] is False


def test_a_battle_of_several_turns_keeps_both_conversations_apart(page, workers):
    ask_both(page, "one")
    ask_both(page, "two")
    for number, worker in enumerate(workers):
        said = [(m["role"], m["content"]) for m in worker.seen["bodies"][-1]["messages"]]
        assert said == [("user", "one"), ("assistant", f"answer number {number}"), ("user", "two")]
    page.button("Both are bad").click()
    expect(page.page.locator(".verdict")).to_contain_text("Both are bad")


def test_both_can_be_shown_at_once_so_that_speed_tells_nothing(page, workers):
    workers[1].do(delay_s=0.5, chunks=8)
    page.page.get_by_label("Show both at once").check()
    page.ask("which?")
    expect(page.page.get_by_text("Finished; shown when the other one is, too.")).to_be_visible()
    assert "answer number" not in page.page.get_by_role("tabpanel").inner_text()
    expect(page.page.get_by_role("tabpanel")).to_contain_text("answer number 0")
    expect(page.page.get_by_role("tabpanel")).to_contain_text(f"{NAMES[1]}7")


def test_side_by_side_names_both_and_its_votes_are_kept_apart(page, running, workers):
    page.tab("Side by side")
    panel = page.page.get_by_role("tabpanel")
    panel.get_by_label("Model B").select_option(NAMES[0])
    panel.get_by_label("Model A").select_option(NAMES[1])
    panel.get_by_label("Your message", exact=True).fill("which?")
    panel.get_by_label("Your message", exact=True).press("Enter")
    expect(panel.locator(".who")).to_have_text([f"A: {NAMES[1]}", f"B: {NAMES[0]}"])
    expect(panel.locator("article.answer .markdown")).to_have_text(["answer number 1", "answer number 0"])
    panel.get_by_role("button", name="A is better").click()
    expect(panel.locator(".verdict")).to_contain_text("does not count: the names were shown")
    vote = votes(running)[-1]
    assert (vote["models"], vote["anonymous"], vote["counted"]) == (dict(zip("ab", NAMES[::-1])), False, False)


def test_a_round_that_a_restart_has_ended_says_so(chromium, workers, tmp_path):
    from urllib.parse import urlsplit

    config = {"workers": [{"url": each.entry} for each in workers], "record": str(tmp_path / "record")}
    for worker in workers:
        worker.do(words="hm")
    with gateways.gateway(*QUICK, config=config, directory=tmp_path) as process:
        port = urlsplit(process.url).port
        with visit(chromium, process.url.removesuffix("v1") + "#arena") as page:
            ask_both(page)
            process.process.kill()
            process.process.wait()
            with gateways.gateway(*QUICK, "--port", str(port), config=config, directory=tmp_path):
                page.button("Tie").click()
                expect(page.page.locator(".trouble")).to_contain_text("Start a new round.")


def test_the_leaderboard_shows_ratings_with_intervals_and_what_it_left_out(chromium, workers, tmp_path):
    config = {"workers": [{"url": each.entry} for each in workers], "record": str(tmp_path / "record")}
    workers[0].do(words="right")
    workers[1].do(words="wrong")
    serving = gateways.gateway(*QUICK, config=config, directory=tmp_path)
    with serving as process, visit(chromium, process.url.removesuffix("v1") + "#leaderboard") as page:
        panel = page.page.get_by_role("tabpanel")
        expect(panel).to_contain_text("Nobody has voted in the arena yet.")
        page.tab("Arena")
        for number in range(3):
            ask_both(page, f"question {number}")
            first = page.answers().first.locator(".markdown").inner_text()
            page.button("A is better" if first == "right" else "B is better").click()
            page.page.locator(".verdict").get_by_role("button", name="New round").click()
        page.tab("Leaderboard")
        rows = panel.locator("table").first.locator("tbody tr")
        expect(rows).to_have_count(2)
        best = rows.first.inner_text()
        assert best.startswith("1") and NAMES[0] in best and "few battles" in best
        low, high = map(int, re.search(r"(-?\d+) to (-?\d+)", best).groups())
        assert low < 1000 < high, "three battles say little"
        assert re.search(r"\t3\t3\t0\t0\t0$", best)
        expect(panel).to_contain_text("3 of 3 votes count")
        panel.get_by_text("Who won against whom").click()
        expect(panel.locator("table").nth(1)).to_contain_text("100 % of 3")


@pytest.mark.parametrize(
    "models, record, said", [(1, True, "an arena needs two"), (2, False, "start it with --record")]
)
def test_where_there_is_no_arena_the_page_says_why(chromium, workers, tmp_path, models, record, said):
    config = {"workers": [{"url": each.entry} for each in workers[:models]]}
    config |= {"record": str(tmp_path / "record")} if record else {}
    for worker in workers:
        worker.do(words="hm")
    serving = gateways.gateway(*QUICK, config=config, directory=tmp_path)
    with serving as process, visit(chromium, process.url.removesuffix("v1") + "#arena") as page:
        expect(page.page.get_by_role("tabpanel")).to_contain_text(said)
        page.tab("Side by side")
        page.page.get_by_role("tabpanel").get_by_label("Your message", exact=True).fill("still?")
        page.page.get_by_role("tabpanel").get_by_label("Your message", exact=True).press("Enter")
        expect(page.page.get_by_role("tabpanel").locator(".markdown")).to_have_text(["hm", "hm"])
        expect(page.page.get_by_role("tabpanel")).to_contain_text("No votes here")
        wait_until(lambda: page.button("Tie").count() == 0, "there is nothing to vote with")
