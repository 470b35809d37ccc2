"""Whatever a generation_config.json holds, what is exported is one that transformers writes, reads and generates with."""

import contextlib
import json
import logging
from collections.abc import Iterator

import pytest
from helpers import forks
from helpers.bugs import bug

from fastft.model import generation_config
from fastft.model.generation_config import read_generation_config


@pytest.fixture(scope="module")
def loaded_model(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What fastft says within the block, one entry a message."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("fastft").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("fastft").removeHandler(handler)


def exported(text: str | bytes, tmp_path) -> tuple[dict, list[str], list[int]]:
    """(the values written again, what was said, further ends) of a generation_config.json with this text."""
    from transformers import GenerationConfig

    (tmp_path / "generation_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with heard() as said:
        config, ends = read_generation_config(str(tmp_path))
    config.eos_token_id = [1]  # a changed one is written strictly
    config.save_pretrained(tmp_path / "written")
    assert GenerationConfig.from_pretrained(tmp_path / "written") == config
    written = json.loads((tmp_path / "written" / "generation_config.json").read_text())
    return {k: v for k, v in written.items() if k not in ("transformers_version", "eos_token_id")}, said, ends


SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.6}


@pytest.mark.parametrize(
    ("values", "kept", "says"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, SAMPLED, ["temperature 0.9 and top_p 0.6 without do_sample"]),
        ({"temperature": 0.9, "top_p": 0.6, "do_sample": None}, SAMPLED, ["the exported file says do_sample true"]),
        (SAMPLED, SAMPLED, []),
        ({"top_k": 20}, {"do_sample": True, "top_k": 20}, ["top_k 20 without do_sample"]),
        ({"min_p": 0.1}, {"do_sample": True, "min_p": 0.1}, ["min_p 0.1 without do_sample"]),
        ({"temperature": 1.0, "top_k": 50, "top_p": 1.0}, {"temperature": 1.0, "top_k": 50, "top_p": 1.0}, []),
        # Greedy decoding, said outright or as other libraries do.
        ({"do_sample": False, "temperature": 0.7}, {"do_sample": False}, ["left out", "temperature 0.7"]),
        ({"temperature": 0.0, "top_p": 0.6}, {"do_sample": False}, ["left out", "temperature 0.0", "top_p 0.6"]),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}, ["temperature 0 ("]),
        ({"top_k": 0}, {}, ["top_k 0"]),
        # Values that nothing can be made of.
        ({"temperature": "hot", "top_p": 1.7, "min_p": 0.1}, {"do_sample": True, "min_p": 0.1}, ['"hot"', "top_p 1.7"]),
        ({"do_sample": "yes", "top_k": 9}, {"do_sample": True, "top_k": 9}, ["top_k 9 without", 'do_sample "yes"']),
        ({"temperature": float("nan"), "top_p": float("inf")}, {}, ["temperature NaN", "top_p Infinity"]),
        ({"early_stopping": 7, "max_new_tokens": 0}, {}, ["early_stopping 7", "max_new_tokens 0"]),
        ({"cache_implementation": "no", "compile_config": {"a": 1}}, {}, ["cache_implementation", "compile_config"]),
        ({"suppress_tokens": 5, "num_beams": "x", "dtype": 5}, {}, ["suppress_tokens 5", 'num_beams "x"', "dtype 5"]),
        ({"self": 3}, {}, ["self 3 (is no setting"]),
        ({"validate": 3, "save_pretrained": 1, "streamer": 1}, {}, ["validate 3", "save_pretrained 1", "streamer 1"]),
        # Valid together only.
        ({"length_penalty": 2.0}, {}, ["length_penalty 2.0 (this flag is only used in beam-based"]),
        ({"length_penalty": 2.0, "num_beams": 4}, {"length_penalty": 2.0, "num_beams": 4}, []),
        ({"output_scores": True}, {}, ["output_scores true"]),
        ({"num_return_sequences": 3}, {}, ["num_return_sequences 3"]),
        # What no one knows does no harm, and is another program's.
        ({"chat_format": "chatml"}, {"chat_format": "chatml"}, []),
        ({"repetition_penalty": 1.1, "pad_token_id": -1, "_from_model_config": True}, {"repetition_penalty": 1.1}, []),
    ],
    ids=str,
)  # fmt: skip
def test_values_are_kept_mended_or_left_out_and_that_is_said(values, kept, says, tmp_path, loaded_model):
    import torch
    from transformers import GenerationConfig

    written, said, _ = exported(json.dumps(values), tmp_path)
    assert written == kept
    assert all(text in "\n".join(said) for text in says) and bool(said) == bool(says)
    assert all(line.startswith(f"{tmp_path}") and "\n" not in line for line in said)
    config = GenerationConfig.from_pretrained(tmp_path / "written", max_new_tokens=2, pad_token_id=0)
    assert loaded_model.generate(torch.tensor([[5, 6, 7]]), generation_config=config).shape[1] > 3


@pytest.mark.parametrize("text", [b"{", b"", b"[]", b"null", b"\xff\xfe{\x00", b"[" * 100_000])
def test_a_damaged_file_is_left_out_and_that_is_said(text, tmp_path):
    written, said, ends = exported(text, tmp_path)
    assert written == {} and ends == []
    assert len(said) == 1 and "generation_config.json: is damaged" in said[0] and "left out" in said[0]


def test_without_a_file_there_is_nothing_to_say(tmp_path):
    with heard() as said:
        config, ends = read_generation_config(str(tmp_path))
    assert ends == said == [] and config.do_sample is None


def test_further_ends_are_token_ids(tmp_path):
    assert exported('{"eos_token_id": [2, "x", true, -1, 5, 1.5, null]}', tmp_path)[2] == [2, 5]
    assert exported('{"eos_token_id": 7}', tmp_path)[2] == [7]
    assert exported('{"eos_token_id": "x"}', tmp_path)[2] == []


def test_transformers_own_warnings_of_what_is_mended_are_not_heard(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.9, "length_penalty": 2.0}')
    script = (
        "import sys; from fastft.common import logs; from fastft.model.generation_config import read_generation_config;"
        "logs.show(); read_generation_config(sys.argv[1])"
    )
    done = forks.run(["-c", script, tmp_path])
    assert done.returncode == 0 and done.stdout == ""
    assert [line.startswith("warning: ") for line in done.stderr.splitlines()] == [True, True], done.stderr


@pytest.mark.parametrize("function", ["_require_alone", "_is_applied"])
@pytest.mark.parametrize(("fails", "error"), [("int('not a number')", ValueError), ("{}['injected']", KeyError)])
def test_a_bug_of_ours_is_no_fault_of_the_file(tmp_path, monkeypatch, function, fails, error):
    (tmp_path / "generation_config.json").write_text('{"use_cache": true}')
    monkeypatch.setattr(generation_config, function, bug(generation_config, fails))
    with pytest.raises(error):
        read_generation_config(str(tmp_path))
