"""Fixtures for all tests. Hypothesis runs the same examples every time, so that a test turns red by a change and not by luck."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers with two threads each run at half speed on two cores

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fastft", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("fastft")

# Its log handler keeps the stderr of the moment of the first import. Within a test that is pytest's, which is closed afterwards.
import transformers.utils.logging  # noqa: E402, F401

transformers.utils.logging.get_logger()

import pytest  # noqa: E402
from helpers import models  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _token_cache(tmp_path_factory):
    """Let all tests of a worker share one cache of tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """A directory with a tiny Llama, `model`, and some conversations, `data.jsonl`. No test writes there."""
    path = tmp_path_factory.mktemp("ground")
    models.make_model(path / "model")
    models.make_data(path / "data.jsonl")
    return path


@pytest.fixture(scope="session")
def model(ground):
    """The directory of the tiny Llama of `ground`."""
    return ground / "model"


@pytest.fixture(scope="session")
def data(ground):
    """The 24 conversations of `ground`."""
    return ground / "data.jsonl"
