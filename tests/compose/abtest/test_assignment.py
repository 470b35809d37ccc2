"""Users are assigned as GrowthBook's SDKs assign them: its published numbers, and what the hash must do on many users."""

import datetime
from collections import Counter

import pytest

from fastft.compose.abtest.assignment import arm_of, bucket, bucket_ranges, fnv1a_32, in_namespace
from fastft.compose.abtest.policy import Experiment
from fastft.errors import UserError

NOON = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.timezone.utc).timestamp()
HALVES = {"control": ("a", 0.5), "blend": ("chai", 0.5)}


@pytest.mark.parametrize(
    "unit, seed, version, number",  # GrowthBook, cases.json (specVersion 0.6 and 0.7): hash, and buckets of feature rules
    [
        ("a", "", 1, 0.22),
        ("b", "", 1, 0.077),
        ("ab", "", 1, 0.946),
        ("def", "", 1, 0.652),
        ("8952klfjas09ujkasdf", "", 1, 0.549),
        ("123", "", 1, 0.011),
        ('___)((*":&', "", 1, 0.563),
        ("a", "seed", 2, 0.0505),
        ("123", "feature", 1, 0.863),
        ("456", "feature", 1, 0.178),
        ("fds", "feature", 1, 0.514),
        ("123", "feature", 2, 0.5231),
    ],
)
def test_buckets_are_growthbooks(unit, seed, version, number):
    assert bucket(unit, seed, version) == number


def test_a_character_beyond_16_bits_counts_as_two_units_as_in_javascript():
    def by_hand(*units):
        value = 2166136261
        for unit in units:
            value = ((value ^ unit) * 16777619) % 2**32
        return value

    assert fnv1a_32("ü") == by_hand(0xFC)
    assert fnv1a_32("😀") == by_hand(0xD83D, 0xDE00)
    assert fnv1a_32("") == by_hand() and fnv1a_32("\ud83d") == by_hand(0xD83D)


@pytest.mark.parametrize(
    "weights, coverage, ranges",  # GrowthBook, getBucketRange
    [
        ([0.5, 0.5], 1, [(0, 0.5), (0.5, 1)]),
        ([0.5, 0.5], 0.5, [(0, 0.25), (0.5, 0.75)]),
        ([0.25] * 4, 1, [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]),
        ([0.4, 0.6], 1, [(0, 0.4), (0.4, 1)]),
        ([0.2, 0.3, 0.5], 0.2, [(0, 0.04), (0.2, 0.26), (0.5, 0.6)]),
        ([0.4, 0.5999], 1, [(0, 0.4), (0.4, 0.9999)]),
    ],
)
def test_ranges_are_growthbooks(weights, coverage, ranges):
    found = bucket_ranges(weights, coverage)
    assert [end for pair in found for end in pair] == pytest.approx([end for pair in ranges for end in pair])


@pytest.mark.parametrize(
    "number, ranges, arm",  # GrowthBook, chooseVariation
    [
        (0.2, [(0, 0.5), (0.5, 1)], 0),
        (0.6, [(0, 0.5), (0.5, 1)], 1),
        (0, [(0, 0.5), (0.5, 1)], 0),
        (0.5, [(0, 0.5), (0.5, 1)], 1),
        (0.8, [(0, 0.25), (0.5, 0.75)], None),
        (0.25, [(0, 0.25), (0.5, 0.75)], None),
        (0.5, [(0, 0.25), (0.5, 0.75)], 1),
        (0.5, [(0, 0.5), (0.5, 0.5), (0.5, 1)], 2),
    ],
)
def test_arms_are_growthbooks(number, ranges, arm):
    assert arm_of(number, ranges) == arm


@pytest.mark.parametrize(
    "unit, name, low",  # GrowthBook, inNamespace: whether the user is in [0, .4)
    [
        ("1", "namespace1", False),
        ("1", "namespace2", False),
        ("2", "namespace1", False),
        ("2", "namespace2", False),
        ("3", "namespace1", False),
        ("3", "namespace2", True),
        ("4", "namespace1", False),
        ("4", "namespace2", True),
    ],
)
def test_namespaces_are_growthbooks(unit, name, low):
    assert in_namespace(unit, name, (0, 0.4)) is low and in_namespace(unit, name, (0.4, 1)) is not low


def test_shares_are_kept_over_many_users_and_two_experiments_are_independent():
    first, second = Experiment("spring", HALVES, "control"), Experiment("summer", HALVES, "control")
    users = [f"user-{n}" for n in range(20000)]
    both = Counter((first.assign(u, NOON).arm, second.assign(u, NOON).arm) for u in users)
    assert len(both) == 4 and sum((n - 5000) ** 2 / 5000 for n in both.values()) < 16.3  # 3 degrees, p = .001


def test_a_user_keeps_the_arm_when_the_coverage_grows():
    small, large = (Experiment("x", HALVES, "control", coverage=share) for share in (0.2, 0.8))
    users = [f"u{n}" for n in range(5000)]
    counted = [user for user in users if small.assign(user, NOON).counted]
    assert 850 < len(counted) < 1150
    assert all(small.assign(user, NOON) == large.assign(user, NOON) for user in counted)


def test_experiments_with_separate_parts_of_a_namespace_share_no_user():
    one = Experiment("one", HALVES, "control", namespace=("page", (0, 0.5)))
    two = Experiment("two", HALVES, "control", namespace=("page", (0.5, 1)))
    counts = Counter((one.assign(f"u{n}", NOON).counted, two.assign(f"u{n}", NOON).counted) for n in range(3000))
    assert set(counts) == {(True, False), (False, True)}


def test_who_is_not_in_the_experiment_gets_the_control_and_is_not_counted():
    experiment = Experiment("x", HALVES, "control", until=datetime.date(2026, 11, 30))
    user = next(f"u{n}" for n in range(99) if experiment.assign(f"u{n}", NOON).arm == "blend")
    found = experiment.assign(user, NOON)
    assert (found.model, found.share, found.counted, found.why) == ("chai", 0.5, True, "arm blend")
    for nobody, now, why in (
        (None, NOON, "no user is known"),
        ("", NOON, "no user is known"),
        (user, NOON + 12 * 3600, "the experiment is over"),
    ):
        found = experiment.assign(nobody, now)
        assert (found.arm, found.model, found.counted) == ("control", "a", False) and why in found.why
    assert experiment.assign(user, NOON + 12 * 3600 - 1).counted, "the last day is a day of the experiment"


def test_the_probability_of_a_model_is_the_share_of_its_arms():
    arms = {"a1": ("a", 0.25), "a2": ("a", 0.25), "b": ("b", 0.5)}
    assert Experiment("aa", arms, "a1").shares == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"arms": {"control": ("a", 1.0)}}, "needs two arms"),
        ({"control": "kontrol"}, "there is no arm 'kontrol'"),
        ({"arms": {"control": ("a", 0.5), "b": ("b", 0.4)}}, "the shares sum to 0.9"),
        ({"arms": {"control": ("a", 0.0), "b": ("b", 1.0)}}, "the share of control is 0"),
        ({"arms": {"control": ("a", float("nan")), "b": ("b", 1.0)}}, "the share of control is nan"),
        ({"coverage": 0.0}, "coverage is 0"),
        ({"namespace": ("p", (0.5, 0.5))}, "namespace"),
        ({"hash_version": 3}, "hash_version is 3"),
    ],
)
def test_an_experiment_that_cannot_be_is_one_line(change, words):
    with pytest.raises(UserError, match=words):
        Experiment("x", **({"arms": HALVES, "control": "control"} | change))
