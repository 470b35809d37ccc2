"""Filters reject conversations, or single rounds, that are unfit to learn from; repairs change turns. One function a reason.

steps.py       the table of all filters and repairs, in the order in which they are applied
chosen.py      which of them a run uses: those that are on, and the user's own
apply.py       what they decide about a conversation
base.py        the three kinds of steps

structure.py   who speaks when, error messages instead of turns, answers in pieces, limits
refusals.py    refusals and self-descriptions, in nine languages
quality.py     loops, broken text, blocked phrases
language.py    which language a conversation is in
privacy.py     masks for personal data and secrets
moderation.py  an endpoint that judges texts; the first pass asks it, in batches, about what all other filters keep
"""
