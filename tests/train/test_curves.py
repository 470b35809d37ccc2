"""report.html loads nothing, shows the numbers as they are, and is safe whatever a model has answered."""

import html
import json
import random
import re

import pytest
from helpers.pages import CHROMIUM, HOSTILE, browse, rows, texts
from lxml import etree
from lxml import html as lxml_html

from fastft.common.html import code_and_prose, compact, duration, flatten, funnel, precise, sha256, ticks, visible
from fastft.demo.report import write_report
from fastft.train.report.curves import Training, thin

LEDGER = {
    "input": 210,
    "kept": 180,
    "rejected": {"duplicate": 7, "empty_answer": 20, "too_short": 3},
    "parts": 201,
    "repairs": {"trimmed_last_question": 4},
    "rounds": {"in": 213, "kept": 212, "rejected": 1},
    "warnings": ["dump.json: the array ends early"],
}
SAMPLES = [
    {
        "question": "Say hello.",
        "before": "the the\n\n the",
        "after": "Hello!\n\n```python\nprint('<hello>')\n```\nDone.",
    }
]


def write(tmp_path, **changes) -> str:
    pieces = {"title": "A run", "ledger": LEDGER, "metrics": rows(40, 10), "samples": SAMPLES}
    pieces |= {"settings": {"seq_len": 512, "optimizer": {"lr": 2e-5}}, "files": {"model": str(tmp_path / "model")}}
    write_report(tmp_path / "report.html", **pieces | changes)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_has_its_pieces(tmp_path):
    page = write(tmp_path)
    parser = etree.HTMLParser()
    etree.fromstring(page, parser)
    assert [
        e.message for e in parser.error_log if not re.fullmatch(r"Tag \w+ invalid\n?", e.message)
    ] == []  # HTML 4's tags
    assert texts(page, "//h1") == ["A run"]
    assert texts(page, "//h2") == ["Cleaning", "Training", "Samples", "Files"]
    assert "optimizer.lr 2e-05" in " ".join(texts(page, "//dl[@class='settings']"))
    assert texts(page, "//table[@class='funnel']//tr") == [
        "conversations in 210 100.0 %",
        "empty answer 20 9.5 %",
        "duplicate 7 3.3 %",
        "too short 3 1.4 %",
        "conversations kept 180 85.7 %",
        "parts to train on 201",
    ]
    assert texts(page, "//figure//*[@class='name']") == [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Tokens/s",
        "Rows full",
    ]
    assert len(lxml_html.fromstring(page).xpath("//figure[1]//*[contains(@class, 'line held')]")) == 2  # line and dots
    totals = " ".join(texts(page, "//dl[@class='totals']"))
    for total in ("40 3 epochs", "4.0 s 9k tokens/s", "36k", "66.7 % of tokens", "10.0 % of positions", "at step 40"):
        assert total in totals, total
    assert texts(page, "//table[@class='files']//tr") == [
        f"model {tmp_path / 'model'} the trained model, for transformers and vLLM"
    ]
    assert lxml_html.fromstring(page).xpath("//table[@class='files']//a/@href") == ["./model"]
    assert "does not balance" not in page


def test_every_column_under_the_pointer_tells_its_values(tmp_path):
    hovers = texts(write(tmp_path), "(//figure)[1]//*[local-name()='title']")
    assert len(hovers) == 40
    assert re.fullmatch(r"step 10; training [\d.]+; held out 2\.581", hovers[9])
    many = Training(rows(10_000)).plot.hovers
    assert len(many) == 150 and many[0][0] == 0 and sum(width for _, width, _ in many) == pytest.approx(100)
    assert re.fullmatch(r"steps 1 to \d+; [\d.]+ \([\d.]+ to [\d.]+\)", many[0][2])


def test_answers_stand_as_they_were_given(tmp_path):
    page = lxml_html.fromstring(write(tmp_path))
    before, after = (e.text_content() for e in page.xpath("//*[@class='text']"))
    assert (before, after) == (SAMPLES[0]["before"], SAMPLES[0]["after"])
    assert page.xpath("//code/text()") == ["```python\nprint('<hello>')\n```\n"]


@pytest.mark.parametrize(
    "text", ["", "a", "```\nx", "a\n```\nb\n```\nc\n```py\nd\n```", "``` a ``` b", "```\n```\n```"]
)
def test_code_and_prose_together_are_the_text(text):
    assert "".join(piece for _, piece in code_and_prose(text)) == text


def test_an_endless_answer_is_cut_and_the_page_says_so():
    (_, text), *_ = code_and_prose("x" * 1_000_000)
    assert len(text) < 21_000 and text.endswith("[… 980,000 more characters]")


def test_the_funnel_walks_down_to_what_was_kept():
    bars = funnel(LEDGER)
    reasons = [bar for bar in bars if bar["kind"] == "reason"]
    ends = [bar["left"] + bar["bar"] for bar in reasons]
    assert ends == pytest.approx([bars[0]["bar"], *(bar["left"] for bar in reasons[:-1])])
    assert reasons[-1]["left"] == pytest.approx(bars[-2]["bar"])
    assert all(0 <= bar["left"] + bar["bar"] <= 100.001 for bar in funnel(LEDGER | {"parts": 5000}))


def test_an_account_that_does_not_balance_is_called_out(tmp_path):
    assert "2 records are neither kept nor rejected" in write(tmp_path, ledger=LEDGER | {"input": 212})


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_reaches_the_page_unescaped(tmp_path, text):
    metrics = [{"step": 1, "loss": text, "lr": text}, *rows(3)]
    changes = {"title": text, "samples": [{"question": text, "before": text, "after": text}], "files": {text: text}}
    ledger = {**LEDGER, "rejected": {text: 30}, "repairs": {text: 1}, "warnings": [text]}
    page = write(tmp_path, **changes, ledger=ledger, metrics=metrics, settings={text: text, "more": {"a": [text]}})
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", page)
    plain, hostile = lxml_html.fromstring(write(tmp_path, files={"a": "../a"})), lxml_html.fromstring(page)
    assert {e.tag for e in hostile.iter()} <= {e.tag for e in plain.iter()}
    assert len(hostile.xpath("//script")) == 1
    assert not [name for e in hostile.iter() for name in e.attrib if name.startswith("on")]
    assert hostile.xpath("//h1")[0].text_content() == visible(text)
    assert [e.text_content() for e in hostile.xpath("//*[@class='text']")] == [visible(text)] * 2


def test_invisible_characters_are_spelled_out_and_all_others_stay():
    assert visible("a\x00\x1b\u202e\ud800\uffff\U000e0041") == r"a\x00\x1b\u202e\ud800\uffff\U000e0041"
    same = "tab\tnew\nline äöü 漢字 العربية 👩‍💻 \ufffd नमस्ते"
    assert visible(same) == same and visible("a\r\nb") == "a\nb"


def test_links_stay_below_the_page(tmp_path):
    files = {"up": str(tmp_path.parent / "x"), "odd": str(tmp_path / "a b#c?d"), "scheme": "javascript:alert(1)"}
    links = lxml_html.fromstring(write(tmp_path, files=files)).xpath("//a/@href")
    assert "./a%20b%23c%3Fd" in links and not [link for link in links if not link.startswith("./")]


def test_the_page_loads_nothing(tmp_path):
    page = write(tmp_path)
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(", page)
    root = lxml_html.fromstring(page)
    assert not root.xpath("//@src | //link[@href != 'data:,'] | //iframe | //object | //embed | //base | //form")
    (policy,) = root.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_thinning_keeps_the_extremes():
    noise = random.Random(0)
    points = [(float(step), noise.random()) for step in range(100_000)]
    points[31_415], points[77_777] = (31_415.0, 50.0), (77_777.0, -50.0)
    thinned = thin(points, 400)
    assert len(thinned) <= 802 and thinned == sorted(thinned) and set(thinned) <= set(points)
    assert {points[0], points[-1], points[31_415], points[77_777]} <= set(thinned)
    kept = set(thinned)
    for i in range(0, 100_000, 250):  # no stretch looks calmer than it was
        part = sorted(points[i : i + 250], key=lambda point: point[1])
        assert {part[0], part[-1]} <= kept
    assert thin(points[:800], 400) == points[:800]


def test_a_long_run_makes_a_small_page(tmp_path):
    metrics = [row | {"step": step} for step, row in enumerate(100 * rows(1000, 10))]
    assert len(metrics) > 100_000 and len(write(tmp_path, metrics=metrics).encode()) < 500_000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ledger": None}, "No cleaning belongs to this run"),
        ({"ledger": {}}, "No cleaning belongs to this run"),
        ({"ledger": {"input": 0, "kept": 0}}, "Of 0 records, 0 were kept"),
        ({"metrics": []}, "Nothing was trained"),
        ({"metrics": [{"step": 1, "loss": float("nan")}]}, "1 loss is not a finite number, the first at step 1"),
        ({"metrics": [*rows(3), {"step": 4, "loss": float("inf")}, {"step": 5, "loss": None}]}, "2 losses are not"),
        ({"metrics": [{"step": 1}, {"loss": 3}, {}]}, "There is no loss to draw"),
        ({"metrics": [{"step": 7, "eval_loss": 1.5}]}, "All plots are over steps"),
        ({"metrics": rows(1)}, "All plots are over steps"),
        ({"metrics": [row | {"loss": 2.5, "grad_norm": 0} for row in rows(2)]}, "All plots are over steps"),
        ({"samples": []}, "The model was not asked anything"),
        ({"samples": [{"question": "?", "before": None}]}, "Not asked"),
        ({"samples": [{"question": "?", "after": ""}]}, "An empty answer"),
        ({"files": {}, "settings": {}}, "No files are listed"),
    ],
)
def test_what_is_missing_becomes_a_sentence(tmp_path, changes, sentence):
    page = write(tmp_path, **changes)
    assert sentence in html.unescape(page)
    assert not re.search(r"\bnan\b|\binf\b", " ".join(texts(page, "//body")).lower().replace("finite", ""))


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    before = write(tmp_path)
    with pytest.raises(Exception, match="question"):
        write(tmp_path, samples=[{"before": "no question"}])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.3, 7.4), (0, 2e-5), (5, 5), (0, 0), (-3, 2), (1e9, 3e9), (1, 1 + 1e-12), (1e-9, 1e9)]
)
def test_ticks_are_few_and_enclose_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low and high <= found[-1] * (1 + 1e-9) and 2 <= len(found) <= 7 and found == sorted(set(found))


def test_numbers_are_written_for_people():
    assert [precise(v) for v in (0, 2e-5, 1.5e-10, 0.42131, 12.5, 3e9)] == [
        "0",
        "2e-5",
        "1.5e-10",
        "0.4213",
        "12.5",
        "3e9",
    ]
    assert [compact(v) for v in (0, 950, 999.7, 12345, 1.2e6, 3e9)] == ["0", "950", "1k", "12.3k", "1.2M", "3B"]
    assert [duration(v).replace("\u00a0", " ") for v in (0.25, 61, 3599.7)] == ["0.2 s", "1 min 01 s", "1 h 00 min"]
    settings = {"a": {"b": [1, 2], "c": {}}, "d": None, "e": True, "f": []}
    assert dict(flatten(settings)) == {"a.b": "1, 2", "a.c": "{}", "d": "–", "e": "true", "f": "–"}


@pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium: none of chromium, chromium-browser, google-chrome found"
)
def test_a_browser_shows_it_without_a_complaint(tmp_path):
    hostile = [{"question": text, "before": text, "after": text} for text in HOSTILE]
    page = write(tmp_path, samples=hostile)
    dom, complaints = browse(tmp_path, page)
    assert complaints == []  # neither an error nor anything that the security policy had to stop
    assert "step 10; training" in page and "step 10; training" not in dom  # its own script ran: it took the titles
    # Now with a probe that the policy lets through and intruders that it must stop, to see that complaints do show.
    probe = "document.querySelectorAll('.hovers rect')[9].dispatchEvent(new PointerEvent('pointerenter'))"
    page = page.replace("script-src ", f"script-src 'sha256-{sha256(probe)}' ").replace(
        "</body>", f"<script>{probe}</script><script>alert(1)</script><img src='https://example.invalid/x.png'></body>"
    )
    dom, complaints = browse(tmp_path, page)
    assert re.search(r"<output>step 10; training [\d.]+; held out 2\.581</output>", dom)
    assert len(complaints) >= 2 and all("Content Security Policy" in complaint for complaint in complaints)


def test_the_ledger_of_cleaning_is_what_the_page_reads(tmp_path):
    cleaning = pytest.importorskip("cleaning.pipeline")
    dump = [
        {
            "id": "a",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "<p>Hello there.</p>"}],
        },
        7,
    ]
    (tmp_path / "dump.json").write_text(json.dumps(dump))
    cleaning.clean([tmp_path / "dump.json"], tmp_path / "clean", workers=1)
    page = write(tmp_path, ledger=json.loads((tmp_path / "clean" / "report.json").read_text()))
    assert "Of 2 records, 1 were kept" in page and "not a conversation" in page
