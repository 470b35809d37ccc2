"""A teacher that fails on purpose, as a script for `openai_server.endpoint`.

    with openai_server.endpoint(FaultyTeacher(wait_s=0.25)) as server: …

Its answers depend on the request alone, so that two runs over the same rows must end with the same answers. Marks in the last
message ask for a fault: [400] is always refused, [malformed] gets a body without choices the first time, [empty] an empty answer,
[cut] an answer that ends at max_tokens, [refusal] a refusal in OpenAI's field, [sorry] one in words, [think] thoughts beside.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from helpers.openai_server import Failure, completion


@dataclass
class FaultyTeacher:
    """Of all requests, every `every_429`-th is told to wait and every `every_500`-th fails; 0 for none."""

    wait_s: float = 0.0
    every_429: int = 9
    every_500: int = 31
    retry_after: str = "2"
    model: str = ""
    """The name that it reports, by default the one that it is asked for."""
    seen: Counter = field(default_factory=Counter)
    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, body: dict, number: int) -> str | bytes | Failure:
        text = body["messages"][-1]["content"]
        if self.every_429 and number % self.every_429 == self.every_429 - 1:
            return Failure(429, "slow down", retry_after=self.retry_after)
        time.sleep(self.wait_s)
        if self.every_500 and number % self.every_500 == self.every_500 - 1:
            return Failure(500, "the server had an error")
        if "[400]" in text:
            return Failure(400, "this prompt cannot be answered")
        with self.lock:
            self.seen[text] += 1
            first = self.seen[text] == 1
        if "[malformed]" in text and first:
            return json.dumps({"id": "x", "object": "chat.completion", "choices": []}).encode()
        return self._answer(text, body)

    def _answer(self, text: str, body: dict) -> bytes:
        asked = json.dumps([body["messages"], body["model"]], sort_keys=True)
        answer = f"The answer is {hashlib.sha256(asked.encode()).hexdigest()[:12]}."
        named = {**body, "model": self.model or body["model"]}
        if "[empty]" in text:
            return completion("", named)
        if "[cut]" in text:
            return completion(answer[:10], named, "length")
        if "[refusal]" in text:
            return completion(None, named, refusal="I'm sorry, but I can't help with that.")
        if "[sorry]" in text:
            return completion("I'm sorry, but as an AI language model I cannot help with that.", named)
        if "[think]" in text:
            return completion(answer, named, reasoning_content="Let me think about it.")
        return completion(answer, named)
