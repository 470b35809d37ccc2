"""Filters for refusals and self-descriptions of the model that gave the answers, which a new model should not learn.

They are judged turn by turn: the round is rejected, and the dialogue is kept. fastft.data.refusals has the patterns.
"""

from cleaning.settings import FilterSettings
from fastft.data import refusals
from fastft.data.conversation import Message


def self_identification(message: Message, settings: FilterSettings) -> str | None:
    """Complain about an answer in which the model says which company's product it is."""
    return refusals.self_identification(message)


def ai_boilerplate(message: Message, settings: FilterSettings) -> str | None:
    """Complain about an answer that opens with "As an AI language model, I …" and does not decline something harmful."""
    return refusals.ai_boilerplate(message)


def refusal(message: Message, settings: FilterSettings) -> str | None:
    """Complain about a short answer that says what the product cannot do."""
    return refusals.refusal(message)


def policy_refusal(message: Message, settings: FilterSettings) -> str | None:
    """Complain about a short answer that declines something harmful. Off by default."""
    return refusals.policy_refusal(message)
