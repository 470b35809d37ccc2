"""The trainer's reader: what it reads, what it refuses in one line, and that it drops nothing without a word."""

import pytest

from fastft.conversation import LOSS_FLAGS, loss_weight


@pytest.mark.parametrize("key", LOSS_FLAGS)
def test_every_spelling_of_a_loss_flag_is_read(key):
    learned = LOSS_FLAGS[key]
    for value in (True, 1, 1.0):
        assert loss_weight({key: value}) == (1 if learned else 0)
    for value in (False, 0, 0.0):
        assert loss_weight({key: value}) == (0 if learned else 1)
    assert loss_weight({key: None}) is None


def test_masks_say_the_opposite_of_weights():
    assert loss_weight({"weight": 0}) == loss_weight({"mask": True}) == loss_weight({"masked": 1}) == 0
    assert loss_weight({"train": True, "weight": 1, "mask": False}) == 1
    assert loss_weight({"content": "no flag"}) is None
    assert loss_weight({"weight": 0.5}) == 0.5


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"weight": "0"}, "'weight' is \"0\"; expected true or false, 1 or 0"),
        ({"train": "false"}, "'train' is \"false\""),
        ({"weight": -1}, "'weight' is -1"),
        ({"weight": float("nan")}, "'weight' is NaN"),
        ({"loss": 10**400}, "'loss' is a number"),
        ({"mask": [1, 0]}, "'mask' is a list"),
        ({"mask": 2}, "'mask' is 2"),
        ({"train": True, "weight": 0}, "'train': true and 'weight': 0 contradict each other"),
        ({"train": True, "mask": True}, "'train': true and 'mask': true contradict each other"),
    ],
)
def test_a_loss_flag_that_cannot_be_obeyed_is_named(turn, said):
    with pytest.raises(ValueError) as error:
        loss_weight(turn)
    assert said in str(error.value) and "\n" not in str(error.value)
