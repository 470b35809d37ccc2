"""Workers that `fastft serve` starts: our engine with its options, llama.cpp, others by command, and starts after an end."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import gateways, models
from helpers.serving import ENVIRONMENT, ROOT, WorkerProcess, wait_until

from fastft.errors import UserError
from fastft.serve.local import engine_of_template

SCRIPTED = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tests/helpers/scripted_worker.py'))}"


def engine(name: str = "{name}") -> str:
    """The command of an engine that answers by script. The shell's $0 is the model, which it has no use for."""
    return f"sh -c 'exec {SCRIPTED} {name} {{port}}' {{model}}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    models.make_model(path)
    return path


def refused(*flags: str) -> str:
    """The one line of a `fastft serve` that does not start."""
    command = [sys.executable, "-m", "fastft", "serve", "--port", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and done.stdout == "" and len(errors) == 1 and "Traceback" not in done.stderr, (
        done.stderr
    )
    return errors[0]


def children(process: WorkerProcess) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.process.pid)], capture_output=True, text=True)
    return [int(each) for each in found.stdout.split()]


def test_options_of_our_engine_reach_the_worker(tiny):
    with gateways.gateway(
        "--model", str(tiny), "--repeatable", "true", "--max_batch", "1", "--template", "chatml"
    ) as process:
        process.name = "tiny"
        reply = process.chat("hello", max_tokens=3, ignore_eos=True)
        assert reply.json["system_fingerprint"].endswith("-float32")
        assert any("up to 1 answers at once" in line for line in process.said)
        too_many = process.chat("hello", n=2)
        assert too_many.status == 400 and too_many.error["param"] == "n"


def test_any_engine_is_a_command(tiny):
    with gateways.gateway("--model", f"m={tiny}", "--engine", engine()) as process:
        assert process.chat("hello").json["choices"][0]["message"]["content"].startswith("m0")
        [worker] = children(process)
        process.process.send_signal(signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{worker}").exists(), "the engine ends with the gateway, also after kill -9")


def test_a_worker_that_ends_is_started_again(tiny):
    with gateways.gateway("--model", f"m={tiny}", "--engine", engine()) as process:
        for end in (1, 2):
            [worker] = children(process)
            os.kill(worker, signal.SIGKILL)
            pause = f"it is started again in {end} s"
            wait_until(lambda pause=pause: any(pause in line for line in process.said), "it is said")
            gone = process.chat("hello")
            assert gone.status == 503 and gone.error["code"] == "no_worker", "the model is known, and not available"
            wait_until(lambda: process.chat("hello").status == 200, "it answers again")
        assert [each["id"] for each in process.get("/v1/models").json["data"]] == ["m"]
        assert process.get("/health").json["workers"] == 1


def test_an_engine_that_serves_another_name_is_one_line(tiny):
    assert "serves other, not m; give the command {name}" in refused(
        "--model", f"m={tiny}", "--engine", engine("other")
    )


def test_an_engine_that_does_not_start_is_one_line_with_its_last_words(tiny):
    broken = "sh -c 'echo no GPU here >&2; exit 3' {model} {port}"
    assert "the worker of tiny ended with code 3: no GPU here" in refused("--model", str(tiny), "--engine", broken)
    missing = refused("--model", str(tiny), "--engine", "no-such-engine {model} {port}")
    assert "no-such-engine: No such file or directory" in missing


@pytest.mark.parametrize(
    "template, words",
    [
        ("vllm", "must be fastft, llama.cpp, or a command with {model} and {port}"),
        ("vllm serve {model} --port {prot}", "{prot} is unknown"),
        ("vllm serve {model} --port {port", "expected '}'"),
        ("vllm serve '{model} --port {port}", "No closing quotation"),
        ("vllm serve {model} {port} {}", "{} is unknown"),
    ],
)
def test_a_command_that_cannot_be_filled_in_is_refused(template, words):
    with pytest.raises(UserError, match="--engine") as refusal:
        engine_of_template(template)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--engine", "llama.cpp"], "llama.cpp reads GGUF files"),
        (["--engine", "sh -c true {model} {port}", "--repeatable", "true"], "--repeatable is for our own engine"),
    ],
)
def test_an_option_that_does_not_fit_the_engine_is_refused(tiny, flags, words):
    assert words in refused("--model", str(tiny), *flags)


def test_an_option_of_our_engine_is_not_dropped_for_a_gguf_file(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    said = refused("--model", str(tmp_path / "small.gguf"), "--max_queue", "4")
    assert "--max_queue is for our own engine; GGUF files run in llama.cpp" in said


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "web.gguf").write_text("<html>404</html>")
    assert "is no GGUF file" in refused("--model", str(tmp_path / "web.gguf"))
    assert "no such file" in refused("--model", str(tmp_path / "none.gguf"))


def make_gguf(path: Path) -> None:
    """Write a tiny Llama of random weights whose tokens are bytes."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    width, layers, inner = 64, 2, 128
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (writer.add_context_length, 512), (writer.add_embedding_length, width), (writer.add_block_count, layers),
        (writer.add_feed_forward_length, inner), (writer.add_head_count, 2), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, width // 2),
        (writer.add_vocab_size, len(tokens)), (writer.add_tokenizer_model, "llama"), (writer.add_token_list, tokens),
        (writer.add_token_scores, [0.0] * len(tokens)), (writer.add_token_types, [2, 3, 3, *[6] * 256]),
        (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0),
        (writer.add_chat_template, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "),
    ):  # fmt: skip
        add(value)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width)}
    for layer in range(layers):
        square = dict.fromkeys((f"blk.{layer}.attn_{part}" for part in ("q", "k", "v", "output")), (width, width))
        shapes |= square | {
            f"blk.{layer}.ffn_gate": (inner, width),
            f"blk.{layer}.ffn_up": (inner, width),
            f"blk.{layer}.ffn_down": (width, inner),
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.05, shape).astype(np.float32))
    for name in ("output_norm", *(f"blk.{i}.{n}_norm" for i in range(layers) for n in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_served_by_llama_cpp(tmp_path):
    pytest.importorskip("xllamacpp")
    make_gguf(tmp_path / "small.gguf")
    with gateways.gateway("--model", str(tmp_path / "small.gguf")) as process:
        process.name = "small"
        whole = process.chat("hello", max_tokens=5, ignore_eos=True)
        assert whole.status == 200 and whole.json["model"] == "small", whole.content
        assert whole.json["usage"]["completion_tokens"] == 5
        stream = process.stream("hello", max_tokens=5, ignore_eos=True)
        assert stream.done and stream.finish_reasons() == ["length"]
        assert process.chat("hello", model="other").status == 404
