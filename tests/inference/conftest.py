"""What all tests of this room share: the environment that an OpenAI user has."""

import pytest
from helpers.judging import SECRET

from fastft.inference.endpoint import KEY


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """OPENAI_API_KEY is set, and no other endpoint is named as OpenAI's."""
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
