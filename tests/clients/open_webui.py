"""Open WebUI before a real `fastft serve`, used in a real browser (`make test-clients`).

For one question of a person it asks four or five times: the answer, a title, tags, follow-up questions. Those that nobody has
typed are no turns of a conversation in the record. Its environment has 245 packages: 7 GB with CUDA's torch.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import environments
from fleet import answers, ended_with_its_group
from helpers import gateways, models
from helpers.pages import CHROMIUM
from helpers.ports import free_port
from helpers.serving import teach, wait_until

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="SKIPPED ALOUD: Open WebUI needs a browser, and chromium is not here"
)
BROWSER = Path(__file__).parent / "programs" / "open_webui_browser.py"
WINDOW = 65536


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    place = tmp_path_factory.mktemp("open_webui")
    taught = teach(place / "taught", max_position_embeddings=WINDOW)
    endless = models.make_endless_model(place / "endless")
    flags = [
        "--model",
        f"m={taught}",
        "--model",
        f"endless={endless}",
        "--repeatable",
        "--record",
        str(place / "record"),
    ]
    with gateways.gateway(*flags) as process:
        process.record = place / "record"
        yield process


@pytest.fixture(scope="module")
def page(served, tmp_path_factory):
    """The address of Open WebUI, which knows no other server than ours, and asks the network for nothing."""
    place, port = tmp_path_factory.mktemp("webui"), free_port()
    options = {
        "OPENAI_API_BASE_URL": served.url,
        "OPENAI_API_KEY": "none",
        "ENABLE_OLLAMA_API": "False",
        "WEBUI_AUTH": "False",
        "ENABLE_FORWARD_USER_INFO_HEADERS": "True",
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_ENGINE": "openai",  # else it loads a model for that
        "DATA_DIR": str(place / "data"),
        "WEBUI_SECRET_KEY": "for a test",
        "HOME": str(place),
    }
    command = ["env", *(f"{name}={value}" for name, value in options.items())]
    command += [environments.program("open-webui", "open-webui"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with ended_with_its_group(command, place / "log") as process:

        def is_ready() -> bool:
            assert process.poll() is None, (place / "log").read_text()[-3000:]
            return answers(f"http://127.0.0.1:{port}/health")

        wait_until(is_ready, "Open WebUI answers", 600)
        yield f"http://127.0.0.1:{port}"


def browse(page: str, question: str, how: str) -> subprocess.Popen:
    python, pipe = environments.program("playwright", "python"), subprocess.PIPE
    return subprocess.Popen(
        [python, BROWSER, page, CHROMIUM, question, how], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def shown(page: str, question: str, how: str) -> dict:
    out, errors = browse(page, question, how).communicate(timeout=400)
    assert out, errors
    return json.loads(out)


def test_a_person_reads_the_answer_that_was_sent(page, served):
    """The page asks at temperature 1, so that the record says what the answer is."""
    before = len(gateways.events(served.record))
    text = shown(page, "count", "answer")["text"]
    wait_until(lambda: served.health()["in_flight"] == 0, "titles and tags are answered")
    wait_until(lambda: len(gateways.events(served.record)) > before, "the record has it")
    turns = [event for event in gateways.events(served.record)[before:] if event["conversation_from"] != "background"]
    assert [event["conversation_from"] for event in turns] == ["header"], "one question is one turn of a conversation"
    assert "".join(turns[0]["answers"][0]["content"].split()) in "".join(text.split())


def test_a_person_reads_why_a_prompt_was_refused(page):
    assert f"the model's context is {WINDOW} tokens" in shown(page, "long " * (WINDOW // 5 + 10), "error")["text"]


def test_stop_ends_the_work(page, served):
    process = browse(page, "go on", "stop")
    try:
        assert "aaa" in json.loads(process.stdout.readline())["text"]
        wait_until(lambda: served.health()["in_flight"] == 0, "the gateway asks nothing any more")
        assert process.poll() is None, "the page is still open"
    finally:
        process.communicate()
