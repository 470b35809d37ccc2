"""Reads what `fastft grimoire build` has chosen: the choice, the prompt of every setting, and what chooses for each question.

choice = Chosen.load(Path("grimoires/trec"))
choice.content["chosen"], choice.settings
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.records import parse_json
from fastft.compose.grimoire.answering.answers import FEW_SHOT, Setting
from fastft.compose.grimoire.answering.weak import WeakModel
from fastft.compose.grimoire.choosing.rank import Ranker, nearest
from fastft.compose.grimoire.run import RANKED, Endpoints, open_endpoints
from fastft.compose.grimoire.task import LabelTask, OpenSplits, read_questions, read_task
from fastft.compose.grimoire.writing.embed import embedder
from fastft.errors import UserError
from fastft.inference.client import Client
from fastft.inference.endpoint import EndpointConfig


@dataclass(frozen=True)
class Chosen:
    """What choice.json says."""

    directory: Path
    content: dict[str, Any]
    digest: str

    @classmethod
    def load(cls, directory: Path) -> "Chosen":
        """Raises UserError if no choice has been made there."""
        path = directory / "choice.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; choose first: fastft grimoire build TASK.yaml … -o {directory}")
        content = path.read_bytes()
        try:
            return cls(directory, parse_json(content), hashlib.sha256(content).hexdigest()[:16])
        except ValueError:
            raise UserError(f"{path}: is not JSON; build again with another -o") from None

    @property
    def settings(self) -> list[Setting]:
        return [Setting(**each) for each in self.content["settings"]]

    @property
    def grimoires(self) -> list[Setting]:
        return [each for each in self.settings if each.text and each.name != FEW_SHOT]

    @property
    def labels(self) -> list[str]:
        return self.content["labels"]

    def task(self) -> LabelTask:
        task = read_task(Path(self.content["places"]["task"]))
        if [task.description, list(task.labels)] != [self.content["description"], self.labels]:
            raise UserError(
                f"{self.content['places']['task']}: has changed since the choice was made; build again with another -o"
            )
        return task

    def weak(self, endpoints: Endpoints, batch_size: int) -> WeakModel:
        """Raises UserError if another model is there now."""
        places, how = self.content["places"], self.content["answers"]
        found = WeakModel(places["weak"], endpoints.weak, how, places["template"], batch_size, places["dtype"])
        if found.identity != places["identity"]:
            raise UserError(f"{places['weak']}: holds other weights than those that the choice was made for")
        return found

    def endpoints(self, endpoint: EndpointConfig, key_envs: Sequence[str]) -> Endpoints:
        weak, encoder = self.content["places"]["weak"], self.content["encoder"]
        return open_endpoints(self.directory, endpoint, key_envs, None, weak, encoder)

    def split(self) -> OpenSplits:
        """Return train and validation as the choice has used them."""
        parts = {name: set(self.content[name]) for name in ("train", "validation")}
        found = {
            name: [
                each
                for each in read_questions(self.directory / "splits" / f"{name}.jsonl", self.labels)
                if each.id in ids
            ]
            for name, ids in parts.items()
        }
        return OpenSplits(found["train"], found["validation"])

    def chooser(self, name: str, client: Client | None = None) -> "QuestionChooser":
        """Return what chooses a grimoire for each question in the setting `name`: similar or ranked.

        `client` is the embeddings endpoint, if the encoder is one.
        """
        train = [each.text for each in self.split().train]
        embed = embedder(self.content["encoder"], train, self.directory / "embeddings.cache.jsonl", client)
        written = embed([each.text for each in self.grimoires])
        ranker = Ranker.load(self.directory / "ranker.safetensors") if name == RANKED else None
        return QuestionChooser(embed, written, ranker)


class QuestionChooser:
    """Chooses one of several grimoires for each text."""

    def __init__(self, embed: Any, written: Any, ranker: Ranker | None):
        self.embed, self.written, self.ranker = embed, written, ranker

    def places(self, texts: Sequence[str]) -> Any:
        """Return the place of the grimoire for each text [N]."""
        rows = self.embed(texts)
        return nearest(rows, self.written) if self.ranker is None else self.ranker.scores(rows).argmax(1)
