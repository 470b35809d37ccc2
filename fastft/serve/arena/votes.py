"""Turn the votes of a record into judgments (for the judge) and outcomes (for training a router).

A vote counts if the voter did not know the two models' names and did not take it back. `counted` returns how many votes do
not count, by reason.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from fastft.errors import UserError
from fastft.judge.judgment import VOTE_SCORES, Judgment
from fastft.serve.protocol import text_of


def counted(votes: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(votes that count, number of the others by reason). Only the last vote on each battle is looked at."""
    last = {vote["battle"]: vote for vote in votes}
    return [vote for vote in last.values() if vote["counted"]], Counter(
        vote["why_not"] for vote in last.values() if not vote["counted"]
    )


def judgment_of(vote: dict[str, Any]) -> Judgment:
    """A vote as a person's judgment. Equal questions get the same `question_id`: questions are the sampling unit."""
    score_a, score_b = VOTE_SCORES[vote["winner"]]
    return Judgment(
        question_id=vote["question"],
        category="arena",
        mode="pairwise",
        judge=vote["key"] or "people",
        model_a=vote["models"]["a"],
        model_b=vote["models"]["b"],
        score_a=score_a,
        score_b=score_b,
        parsed=True,
        text="",
        turn=len(vote["turns"]["a"]),
        flags=("both_bad",) if vote["winner"] == "both_bad" else (),
    )


def outcomes(votes: Iterable[dict[str, Any]], events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each question: the share of its battles that each model won. A tie counts half.

    "Both bad" counts as a loss of both. Only battles of a single round count, because a router sees a single question.
    Raises UserError for a record without texts.
    """
    votes = [vote for vote in votes if len(vote["turns"]["a"]) == 1]
    wanted = {vote["turns"]["a"][0] for vote in votes}
    texts: dict[str, str | None] = {}
    for event in events:
        if event["id"] in wanted:
            if "messages_sha256" in event:
                raise UserError("the record keeps hashes only (--record_texts false): there are no questions to export")
            texts[event["id"]] = text_of(event["messages"][-1]["content"])
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    queries: dict[str, str] = {}
    for vote in votes:
        query = texts.get(vote["turns"]["a"][0])
        if query is None:
            continue
        queries[vote["question"]] = query
        for side, score in zip("ab", VOTE_SCORES[vote["winner"]]):
            scores[vote["question"]][vote["models"][side]].append(score)
    for question, query in queries.items():
        rewards = {model: sum(those) / len(those) for model, those in scores[question].items()}
        yield {"id": question, "query": query, "tags": [], "rewards": rewards}
