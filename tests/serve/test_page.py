"""The page in a real browser, before a real gateway: chat, stop, ask again, edit, failures in plain words, hostile answers."""

import json
import re
import signal
from urllib.parse import urlsplit

import pytest
from helpers import gateways
from helpers.browser import visit
from helpers.pages import CHROMIUM, HOSTILE
from helpers.serving import ANSWERS, teach, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = playwright.expect
expect.set_options(timeout=30_000)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look with")]

QUICK = ["--check_s", "0.3", "--silence_s", "30"]
NAUGHTY_NAME = "<img src=x onerror=alert(1)>&amp;\"'"


@pytest.fixture(scope="module")
def worker():
    with gateways.scripted("alpha") as process:
        yield process


@pytest.fixture(scope="module")
def running(worker, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gateway")
    workers = [{"url": worker.entry}, {"url": worker.entry, "name": NAUGHTY_NAME}]
    virtual = [{"name": "best", "policy": "fixed", "model": "alpha"}]
    config = {"workers": workers[:1], "virtual": virtual, "record": str(directory / "record")}
    with gateways.gateway(*QUICK, config=config, directory=directory) as process:
        process.record, process.home = directory / "record", process.url.removesuffix("v1")
        yield process


@pytest.fixture
def page(chromium, running, worker):
    worker.do()
    with visit(chromium, running.home) as visited:
        yield visited


# Chat ----------------------------------------------------------------------------------------------------------------------


def test_an_answer_is_streamed_and_named_and_recorded(page, running, worker):
    worker.do(delay_s=0.3, chunks=5)
    page.ask("hello")
    answer = page.answers().first
    expect(answer).to_contain_text("alpha0")
    assert "alpha4" not in answer.inner_text(), "it comes piece by piece"
    expect(answer.locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3 alpha4")
    expect(answer.locator(".who")).to_have_text("alpha")
    expect(page.button("Send")).to_be_visible()
    conversation = page.page.url.partition("#chat/")[2]
    wait_until(lambda: any(e["conversation"] == conversation for e in gateways.events(running.record)), "recorded")


def test_a_virtual_model_says_who_answered(page):
    page.page.get_by_label("Model").select_option("best")
    page.ask("hello")
    expect(page.answers().first.locator("header")).to_have_text("alphaasked: best")


def test_stop_keeps_what_was_written_and_ends_the_work(page, worker):
    left = worker.seen["left"]
    worker.do(delay_s=0.2, chunks=500)
    page.ask("go on")
    expect(page.answers().first).to_contain_text("alpha2")
    page.button("Stop").click()
    expect(page.answers().first).to_contain_text("Stopped.")
    assert "alpha2" in page.answers().first.inner_text()
    wait_until(lambda: worker.seen["left"] == left + 1 and worker.seen["running"] == 0, "the worker has stopped")
    page.button("Regenerate").wait_for()


def test_escape_stops_too(page, worker):
    worker.do(delay_s=0.2, chunks=500)
    page.ask("go on")
    expect(page.answers().first).to_contain_text("alpha1")
    page.page.get_by_label("Your message", exact=True).press("Escape")
    expect(page.answers().first).to_contain_text("Stopped.")


def test_asking_again_and_editing_keep_the_old_versions(page, worker):
    page.ask("first question")
    expect(page.answers().first).to_contain_text("alpha3")
    worker.do(chunks=2)
    page.button("Regenerate").click()
    expect(page.answers().first.locator(".markdown")).to_have_text("alpha0 alpha1")
    expect(page.answers().first.locator(".versions")).to_contain_text("2/2")
    page.button("Earlier version").click()
    expect(page.answers().first.locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3")
    page.button("Edit").click()
    field = page.page.get_by_label("Edit your message")
    expect(field).to_be_focused()
    field.fill("second question")
    field.press("Enter")
    expect(page.page.locator("article.question .said")).to_have_text("second question")
    expect(page.answers().first.locator(".markdown")).to_have_text("alpha0 alpha1")
    assert worker.seen["bodies"][-1]["messages"] == [{"role": "user", "content": "second question"}]
    page.page.locator("article.question").get_by_role("button", name="Earlier version").click()
    expect(page.page.locator("article.question .said")).to_have_text("first question")
    expect(page.answers().first.locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3")


def test_parameters_and_the_conversation_so_far_are_sent(page, worker):
    page.page.get_by_text("Parameters").click()
    page.page.get_by_label("Temperature").fill("0.5")
    page.page.get_by_label("Most tokens").fill("7")
    page.page.get_by_label("System message").fill("Be brief.")
    page.page.keyboard.press("Escape")
    page.ask("one")
    page.button("Regenerate").wait_for()
    page.ask("two")
    expect(page.answers()).to_have_count(2)
    expect(page.button("Regenerate")).to_have_count(2)
    body = worker.seen["bodies"][-1]
    assert (body["temperature"], body["max_tokens"], "top_p" in body) == (0.5, 7, False)
    assert [(m["role"], m["content"].strip()) for m in body["messages"]] == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "alpha0 alpha1 alpha2 alpha3"),
        ("user", "two"),
    ]


def test_a_reload_keeps_conversations_and_says_what_it_cut(page, worker):
    page.ask("first")
    page.button("Regenerate").wait_for()
    worker.do(delay_s=0.2, chunks=500)
    page.ask("second")
    expect(page.answers().nth(1)).to_contain_text("alpha8")  # what is written is saved every second
    page.page.reload()
    expect(page.answers()).to_have_count(2)
    expect(page.answers().first).to_contain_text("alpha3")
    expect(page.answers().nth(1)).to_contain_text("The page was left before this answer was finished.")
    expect(page.answers().nth(1)).to_contain_text("alpha0")
    worker.do()
    page.button("Retry").click()
    expect(page.answers().nth(1)).to_contain_text("alpha3")
    expect(page.answers().nth(1).locator(".versions")).to_contain_text("2/2")
    page.button("New conversation").click()
    expect(page.answers()).to_have_count(0)
    page.page.get_by_role("navigation").get_by_role("button", name="first", exact=True).click()
    expect(page.answers()).to_have_count(2)


def test_a_conversation_is_deleted_for_good(page):
    page.ask("to be forgotten")
    page.button("Regenerate").wait_for()
    page.expected = "Delete “to be forgotten”"
    page.button("Delete to be forgotten").click()
    expect(page.page.get_by_role("navigation")).not_to_contain_text("to be forgotten")
    page.page.reload()
    expect(page.page.get_by_role("heading", name="Talk to")).to_be_visible()
    assert "to be forgotten" not in page.page.locator("body").inner_text()


def test_files_of_a_conversation_are_what_was_said(page, tmp_path):
    from fastft.data.conversation import read_conversations

    page.ask("What?")
    page.button("Regenerate").wait_for()
    for name in ("As text (.md)", "For fastft (.jsonl)"):
        page.page.get_by_text("Save", exact=True).click()
        with page.page.expect_download() as download:
            page.button(name).click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
        page.page.keyboard.press("Escape")
    assert (
        tmp_path / "What.md"
    ).read_text() == "# What?\n\n**You**\n\nWhat?\n\n**alpha**\n\nalpha0 alpha1 alpha2 alpha3 \n"
    [read] = read_conversations(tmp_path / "What.jsonl")
    assert [(m.role, m.content, m.train) for m in read.messages][1] == (
        "assistant",
        "alpha0 alpha1 alpha2 alpha3 ",
        True,
    )


def test_enter_that_confirms_a_word_of_an_input_method_does_not_send(page, worker):
    asked = len(worker.seen["bodies"])
    box = page.page.get_by_label("Your message", exact=True)
    box.fill("に")
    for options in ("{isComposing: true}", "{keyCode: 229}"):
        box.evaluate(
            f"box => box.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true, ...{options}}}))"
        )
    box.press("Shift+Enter")
    expect(box).to_have_value("に\n")
    assert len(worker.seen["bodies"]) == asked
    box.press("Enter")
    expect(page.page.locator("article.question .said")).to_have_text("に")


def test_what_is_being_written_survives_a_reload(page):
    box = page.page.get_by_label("Your message", exact=True)
    box.fill("half a tho")
    # Kept before the next frame, which a page that is left at once does not see.
    type_and_look = """box => {
        box.value = "half a tho";
        box.dispatchEvent(new InputEvent("input", {bubbles: true}));
        return Object.values(sessionStorage);
    }"""
    assert "half a tho" in box.evaluate(type_and_look)
    page.page.reload()
    expect(page.page.get_by_label("Your message", exact=True)).to_have_value("half a tho")


def test_scrolling_up_stops_following_and_the_end_follows_again(page, worker):
    worker.do(delay_s=0.05, chunks=400, words=None)
    page.page.set_viewport_size({"width": 500, "height": 400})
    page.ask("\n".join(f"line {i}" for i in range(40)))
    expect(page.answers().first).to_contain_text("alpha20")
    scroll = page.page.get_by_role("log")
    at_end = "box => box.scrollHeight - box.scrollTop - box.clientHeight < 40"
    wait_until(lambda: scroll.evaluate(at_end), "it follows")
    scroll.evaluate("box => { box.scrollTop = 0 }")
    page.button("↓ Newest").wait_for()
    seen = page.answers().first.inner_text()
    wait_until(lambda: len(page.answers().first.inner_text()) > len(seen) + 40, "more has come")
    assert scroll.evaluate("box => box.scrollTop") == 0
    page.button("↓ Newest").click()
    wait_until(lambda: scroll.evaluate(at_end), "it is at its end")
    seen = page.answers().first.inner_text()
    wait_until(lambda: len(page.answers().first.inner_text()) > len(seen) + 40, "more has come")
    wait_until(lambda: scroll.evaluate(at_end), "it follows again")
    page.button("Stop").click()


# Markdown ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [*HOSTILE[:-1], "[x](javascript:alert(1)) ![y](http://evil.example/y.png) <b onclick=alert(1)>z</b>"]
)
def test_hostile_answers_and_questions_are_text(page, worker, text):
    worker.do(words=text)
    page.ask(text)
    page.button("Regenerate").wait_for()
    for box in page.answers().first.locator(".markdown"), page.page.locator(".said"):
        assert (
            box.locator("script, img, svg, style, iframe, form, input, [onclick], [onerror], [onmouseover]").count()
            == 0
        )
        assert box.locator("a:not([href^='http'])").count() == box.locator("a:not([href])").count()
    expect(page.page.locator(".said")).to_have_text(text, use_inner_text=True)
    if "<script>" in text:
        expect(page.answers().first).to_contain_text("<script>alert(1)</script>")
    page.tab("About")
    page.tab("Chat")
    expect(page.answers().first).to_be_visible()


def test_names_of_models_are_text(chromium, worker, tmp_path):
    worker.do()
    config = {"workers": [{"url": worker.entry, "name": NAUGHTY_NAME}]}
    serving = gateways.gateway(*QUICK, config=config, directory=tmp_path)
    with serving as process, visit(chromium, process.url.removesuffix("v1")) as page:
        expect(page.page.get_by_role("heading", name="Talk to")).to_have_text(f"Talk to {NAUGHTY_NAME}")
        page.ask("hello")
        page.button("Regenerate").wait_for()
        expect(page.answers().first.locator(".who")).to_have_text("alpha")  # as its worker says in each chunk
        page.tab("About")
        expect(page.page.get_by_role("tabpanel")).to_contain_text(NAUGHTY_NAME)
        assert page.page.locator("img").count() == 0


def test_the_page_forbids_whatever_is_not_its_own(running):
    headers = running.get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "require-trusted-types-for 'script'" in policy and headers["x-content-type-options"] == "nosniff"
    again = running.get("/", **{"If-None-Match": headers["etag"]})
    assert (again.status, again.content) == (304, b"")


def test_code_is_framed_highlighted_and_copied(chromium, running, worker):
    code = "def f(x):\n    return x < 1 and '<b>'"
    worker.do(words=f"Here:\n\n```python\n{code}\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- one\n- **two**")
    with visit(chromium, running.home, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.ask("code")
        page.button("Regenerate").wait_for()
        block = page.answers().first.locator(".code-block")
        expect(block.locator(".hljs-keyword").first).to_have_text("def")
        expect(block.locator("code")).to_have_text(code, use_inner_text=True)
        block.get_by_role("button", name="Copy code").click()
        expect(block.get_by_role("button", name="Copied")).to_be_visible()
        assert page.page.evaluate("navigator.clipboard.readText()").strip() == code
        page.answers().first.locator("footer").get_by_role("button", name="Copy").click()
        expect(page.answers().first.locator("footer")).to_contain_text("Copied")
        assert page.page.evaluate("navigator.clipboard.readText()").startswith("Here:")
        assert page.answers().first.locator("table td").all_inner_texts() == ["1", "2"]
        assert page.answers().first.locator("li strong").inner_text() == "two"


def test_an_open_fence_is_code_already_and_finished_blocks_are_left_alone(page):
    """A long answer costs what is new: blocks that are settled are the same nodes at the end."""
    result = page.page.evaluate(
        """async () => {
            const { MarkdownView } = await import("./web/markdown.js");
            const box = document.createElement("div");
            const view = new MarkdownView(box);
            let text = "", first = null, open = null;
            const list = "- a\\n\\n- b\\n\\n".repeat(3), code = "```js\\nlet x = 1;\\n```\\n\\n";
            const whole = "First *words*.\\n\\n" + list + "Para.\\n\\n" + code + "End 👩\u200d👩\u200d👧.\\n";
            for (const letter of whole) {
                text += letter;
                view.update(text, false);
                if (text.endsWith("Para.")) first = box.querySelector("p");
                if (text.endsWith("let")) open = box.querySelector("pre code").textContent;
            }
            view.update(text, true);
            const once = new MarkdownView(document.createElement("div"));
            once.update(whole, true);
            const plain = (view) => view.element.textContent.replace(/\\s+/g, " ");
            const lists = box.querySelectorAll("ul").length;
            return { same: first === box.querySelector("p"), open, lists, equal: plain(view) === plain(once) };
        }"""
    )
    assert result == {"same": True, "open": "let\n", "lists": 1, "equal": True}


def test_another_tab_shows_what_was_said_here_and_does_not_save_over_it(page):
    page.ask("from the first tab")
    page.button("Regenerate").wait_for()
    second = page.page.context.new_page()
    second.goto(page.page.url)
    expect(second.locator("article.answer")).to_have_count(1)
    second.get_by_label("Your message", exact=True).fill("from the second tab")
    second.get_by_label("Your message", exact=True).press("Enter")
    expect(page.answers()).to_have_count(2)
    expect(page.answers().nth(1).locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3")
    page.ask("from the first again")
    expect(page.answers()).to_have_count(3)
    expect(page.answers().nth(2).locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3")
    second.reload()
    expect(second.locator(".said")).to_have_text(["from the first tab", "from the second tab", "from the first again"])


def test_a_double_click_on_send_does_not_stop_the_answer(page, worker):
    worker.do(delay_s=0.2, chunks=6)
    page.page.get_by_label("Your message", exact=True).fill("hello")
    page.button("Send").dblclick()
    expect(page.answers().first.locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3 alpha4 alpha5")


def test_an_answer_goes_on_behind_another_tab_and_another_conversation(page, worker):
    worker.do(delay_s=0.3, chunks=8)
    page.ask("slowly")
    expect(page.answers().first).to_contain_text("alpha0")
    page.tab("About")
    page.tab("Chat")
    page.button("New conversation").click()
    expect(page.answers()).to_have_count(0)
    page.page.get_by_role("navigation").get_by_role("button", name="slowly", exact=True).click()
    expect(page.answers().first).to_contain_text("alpha7")
    expect(page.answers().first).not_to_contain_text("left")


# A real model --------------------------------------------------------------------------------------------------------------


def test_a_real_model_answers_and_says_when_the_conversation_is_too_long(chromium, tmp_path):
    teach(tmp_path / "taught", max_position_embeddings=256)
    serving = gateways.gateway("--model", str(tmp_path / "taught"), "--record", str(tmp_path / "record"))
    with serving as process, visit(chromium, process.url.removesuffix("v1")) as page:
        page.page.get_by_text("Parameters").click()
        page.page.get_by_label("Temperature").fill("0")
        page.page.keyboard.press("Escape")
        for question in ("emoji", "hello"):
            page.button("New conversation").click()
            page.ask(question)
            expect(page.answers().first.locator(".markdown")).to_have_text(ANSWERS[question])
            expect(page.answers().first.locator(".who")).to_have_text("taught")
        page.ask("word " * 300)
        expect(page.page.locator(".trouble")).to_contain_text(
            "The conversation no longer fits into what the model can read."
        )
        expect(page.page.locator(".trouble .detail")).to_contain_text("256")
        page.answers().last.locator("xpath=preceding-sibling::article[1]").get_by_role("button", name="Edit").click()
        page.page.get_by_label("Edit your message").fill("count")
        page.page.get_by_label("Edit your message").press("Enter")
        expect(page.page.locator(".trouble")).to_have_count(0)
        expect(page.answers().last.get_by_role("button", name="Regenerate")).to_be_visible()


# Failures ------------------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_in_mid_answer_is_said_and_the_rest_kept(page, worker):
    worker.do(die_after=3, chunks=9, delay_s=0.1)
    page.ask("hello")
    answer = page.answers().first
    expect(answer).to_contain_text("The worker that was writing this answer is gone.")
    expect(answer.locator(".markdown")).to_have_text("alpha0 alpha1 alpha2")
    expect(page.page.locator(".said")).to_have_text("hello")
    worker.do()
    page.button("Retry").click()
    expect(page.answers().first.locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3")
    expect(page.answers().first.locator(".versions")).to_contain_text("2/2")


@pytest.mark.parametrize(
    "script, said",
    [
        ({"status": 429, "retry_after": "7"}, "alpha says 429"),
        ({"status": 400}, "alpha says 400"),
        ({"error_event": True}, "out of memory"),
    ],
)
def test_other_refusals_are_repeated_and_the_question_is_kept(page, worker, script, said):
    worker.do(**script)
    page.ask("hello")
    expect(page.page.locator(".trouble")).to_contain_text(said)
    assert "NETWORK ERROR" not in page.page.locator("body").inner_text().upper()
    worker.do()
    page.button("Retry").click()
    expect(page.answers().first.locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3")


@pytest.mark.parametrize(
    "code, message, what, hint, detail",
    [
        ("queue_full", "8 wait", "the queue is full", "Retry in 7 s.", "8 wait"),
        ("no_worker", "no worker", "No worker can answer", "Retry in 7 s, or", ""),
        ("rate_limit_exceeded", "60 a minute", "used up its requests", "Retry in 7 s.", "60 a minute"),
        ("something_new", "it is Monday", "The server refused: it is Monday", "retry", ""),
        (None, "", "Something went wrong.", "retry", ""),
    ],
)
def test_an_error_says_what_happened_and_what_to_do(page, code, message, what, hint, detail):
    script = "async (given) => new (await import('./web/api.js')).Failure(...given).plain"
    said = page.page.evaluate(script, [code, message, 7])
    assert what in said["what"] and hint in said["hint"] and said["detail"] == detail


def test_a_worker_that_dies_while_one_types_is_replaced(chromium, tmp_path):
    with gateways.scripted("twin") as one, gateways.scripted("twin") as other:
        config = {"workers": [{"url": one.entry}, {"url": other.entry}], "record": str(tmp_path / "record")}
        serving = gateways.gateway("--check_s", "60", config=config, directory=tmp_path)
        with serving as process, visit(chromium, process.url.removesuffix("v1")) as page:
            page.page.get_by_label("Your message", exact=True).fill("are you there?")
            one.kill()
            for _ in range(4):  # the dead one is the first choice of some
                page.ask("are you there?")
                expect(page.button("Send")).to_be_visible()
                expect(page.answers().last.get_by_role("button", name="Regenerate")).to_be_visible()
            assert page.page.locator(".trouble").count() == 0
            other.kill()
            page.ask("and now?")
            expect(page.page.locator(".trouble")).to_contain_text("No worker can answer for this model just now.")


def test_an_outage_is_said_and_ends_by_itself(chromium, worker, tmp_path):
    worker.do()
    config = {"workers": [{"url": worker.entry}]}
    with gateways.gateway(*QUICK, config=config, directory=tmp_path) as process:
        port = urlsplit(process.url).port
        with visit(chromium, process.url.removesuffix("v1")) as page:
            expect(page.page.get_by_role("heading", name="Talk to")).to_be_visible()
            process.process.send_signal(signal.SIGKILL)
            process.process.wait()
            page.ask("is anybody there?")
            expect(page.page.locator(".trouble")).to_contain_text("The server does not answer.")
            expect(page.page.locator(".banner")).to_contain_text("Trying to reach it again")
            expect(page.page.locator(".said")).to_have_text("is anybody there?")
            with gateways.gateway(*QUICK, "--port", str(port), config=config, directory=tmp_path):
                expect(page.page.locator(".banner")).to_have_text("The server is back.")
                page.button("Retry").click()
                expect(page.answers().first.locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3")
                expect(page.page.locator(".banner")).to_have_text("")


def test_a_key_is_asked_for_and_kept_until_the_tab_is_closed(chromium, worker):
    worker.do()
    with gateways.gateway("--model", worker.entry, "--api_key_env", "KEY", KEY="sesame") as process:
        home = process.url.removesuffix("v1")
        with visit(chromium, home) as page:
            dialog = page.page.get_by_role("dialog")
            for key in ("wrong", "sesame"):
                dialog.get_by_label("Key").fill(key)
                dialog.get_by_label("Key").press("Enter")
                if key == "wrong":
                    expect(dialog).to_contain_text("not accepted")
            page.ask("hello")
            expect(page.answers().first.locator(".markdown")).to_have_text("alpha0 alpha1 alpha2 alpha3")
            page.page.reload()
            expect(page.answers().first).to_be_visible()
            assert page.page.evaluate("localStorage.length") == 0 and "sesame" not in page.page.url


# For everybody -------------------------------------------------------------------------------------------------------------


def test_tabs_are_reached_by_keys_and_by_address(page):
    page.page.get_by_role("tab", name="Chat").focus()
    for name in ("Side by side", "Arena", "Leaderboard", "About", "Chat"):
        page.page.keyboard.press("ArrowRight")
        tab = page.page.get_by_role("tab", name=name)
        expect(tab).to_be_focused()
        expect(tab).to_have_attribute("aria-selected", "true")
        expect(page.page.get_by_role("tabpanel", name=name)).to_be_visible()
    page.page.goto(f"{page.home}#about")
    expect(page.page.get_by_role("heading", name="About")).to_be_visible()
    expect(page.page.get_by_role("tabpanel")).to_contain_text("with texts")


def test_the_end_of_an_answer_is_announced_once_and_not_word_by_word(page, worker):
    page.page.evaluate(
        """() => {
            window.announced = [];
            const box = document.getElementById("announcer");
            const watcher = new MutationObserver(() => announced.push(box.textContent));
            watcher.observe(box, { childList: true, characterData: true, subtree: true });
        }"""
    )
    worker.do(delay_s=0.05, chunks=20)
    page.ask("hello")
    page.button("Regenerate").wait_for()
    assert page.page.evaluate("announced") == ["best is answering", "alpha has answered"]
    assert page.page.get_by_role("log").get_attribute("aria-live") == "off"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(chromium, running, worker, scheme):
    worker.do(words="x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n|a|b|\n|-|-|\n|" + "w " * 99 + "|" + "z" * 99 + "|")
    with visit(chromium, running.home, viewport={"width": 360, "height": 640}, color_scheme=scheme) as page:
        page.ask("long " * 50 + "q" * 200)
        page.button("Regenerate").wait_for()
        for name in ("Chat", "Side by side", "Arena", "Leaderboard", "About"):
            page.tab(name)
            page.page.get_by_role("tabpanel", name=name).wait_for()
            assert page.page.evaluate("document.documentElement.scrollWidth") <= 360, name
        page.tab("Chat")
        assert page.page.evaluate("document.querySelector('#panel-chat .scroll').scrollWidth") <= 360
        ground = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
        assert brightness > 200 if scheme == "light" else brightness < 60


def test_vendored_modules_are_what_was_fetched():
    from helpers import vendored

    listed = dict(reversed(line.split("  ")) for line in vendored.HASHES.read_text().splitlines())
    assert listed == vendored.hashes()
    wanted = {name for entry in json.loads(vendored.LIST.read_text()) for name in entry["files"].values()}
    assert wanted == set(listed) and all(f"{name.split('.')[0]}.LICENSE" for name in wanted)
