"""What the votes of a record say: judgments for the judge, outcomes for the router.

A vote counts if it was for two models whose names nobody knew, and was not taken back. `counted` says how many of the others
there are, and why.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from fastft.errors import UserError
from fastft.judge.judgment import Judgment

SCORES = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5), "both_bad": (0.0, 0.0)}
"""Of model A and of model B. Both bad is a tie for ratings; its flag tells it apart."""


def counted(votes: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(votes that count, the number of the others by reason), of each battle the last vote."""
    last = {vote["battle"]: vote for vote in votes}
    return [vote for vote in last.values() if vote["counted"]], Counter(
        vote["why_not"] for vote in last.values() if not vote["counted"]
    )


def judgment_of(vote: dict[str, Any]) -> Judgment:
    """A vote as the judgment of a person. The unit of chance is the question: equal ones have the same `question_id`."""
    score_a, score_b = SCORES[vote["winner"]]
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
    """One row a question: what share of its battles each model won there, a tie half, both bad nothing.

    Only battles of one question and one answer each: a router sees one question. Raises UserError for a record without texts.
    """
    votes = [vote for vote in votes if len(vote["turns"]["a"]) == 1]
    wanted = {vote["turns"]["a"][0] for vote in votes}
    texts: dict[str, str] = {}
    for event in events:
        if event["id"] in wanted:
            if "messages_sha256" in event:
                raise UserError("the record keeps hashes only (--record_texts false): there are no questions to export")
            texts[event["id"]] = event["messages"][-1]["content"]
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    queries: dict[str, str] = {}
    for vote in votes:
        query = texts.get(vote["turns"]["a"][0])
        if not isinstance(query, str):
            continue
        queries[vote["question"]] = query
        for side, score in zip("ab", SCORES[vote["winner"]]):
            scores[vote["question"]][vote["models"][side]].append(score)
    for question, query in queries.items():
        rewards = {model: sum(those) / len(those) for model, those in scores[question].items()}
        yield {"id": question, "query": query, "tags": [], "rewards": rewards}
