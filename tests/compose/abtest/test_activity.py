"""Who was active on which day after joining, read from the three forms of files; mistakes are named with file and line."""

import gzip
import json
import lzma

import numpy as np
import pytest
from helpers.experiments import read_rows, visits, write_rows

from fastft.compose.abtest.activity import ColumnsConfig, read_activity
from fastft.errors import UserError

DAY = 86_400
T0 = 1_700_000_000


def entries(activity) -> dict:
    """{(user, day): amount}"""
    triples = zip(activity.user_E, activity.day_E, activity.amount_E)
    return {(activity.users[user], int(day)): float(amount) for user, day, amount in triples}


def test_days_are_periods_of_24_hours_after_the_first_row(tmp_path):
    rows = [
        ("a", "x", T0),
        ("a", "x", T0 + DAY - 1),
        ("a", "x", T0 + DAY),
        ("b", "y", T0 + DAY),
        ("b", "y", T0 + 4 * DAY),
    ]
    activity = read_rows(tmp_path / "f.csv", rows, "user,arm,timestamp")
    assert entries(activity) == {("a", 0): 2, ("a", 1): 1, ("b", 0): 1, ("b", 3): 1}
    assert activity.followed_U.tolist() == [3, 2], "the last day that has passed whole; b's day 3 has only begun"
    assert activity.unit == "events"


@pytest.mark.parametrize("shown", ["{}-{}-{}", "{}-{}-{} 00:00:00", "{}{}{}", "{}-{}-{}T00:00:00+02:00"])
def test_dates_stand_for_whole_days(tmp_path, shown):
    first, last = shown.format(2023, 11, "01"), shown.format(2023, 11, "03")
    rows = [("a", "x", first), ("a", "x", last), ("b", "y", last)]
    activity = read_rows(tmp_path / "f.csv", rows, "user,arm,date")
    assert entries(activity) == {("a", 0): 1, ("a", 2): 1, ("b", 0): 1}
    assert activity.followed_U.tolist() == [2, 0]


@pytest.mark.parametrize(
    "shown",
    [
        lambda s: str(s),
        lambda s: str(1000 * s),
        lambda s: str(1_000_000 * s),
        lambda s: str(1_000_000_000 * s),
        lambda s: str(1000 * s if s > T0 else s),
        lambda s: np.datetime_as_string(np.datetime64(s, "s")) + "Z",
        lambda s: np.datetime_as_string(np.datetime64(s + 7200, "s")) + "+02:00",
    ],
)
def test_times_may_be_numbers_of_any_unit_or_iso_with_a_zone(tmp_path, shown):
    rows = [("a", "x", T0), ("a", "x", T0 + 2 * DAY), ("b", "y", T0 + 5 * DAY)]
    activity = read_rows(tmp_path / "f.csv", [(u, a, shown(t)) for u, a, t in rows], "user,arm,time")
    assert entries(activity) == {("a", 0): 1, ("a", 2): 1, ("b", 0): 1}


def test_a_wide_file_has_one_row_a_user(tmp_path):
    rows = [("1", "x", 7, 1, 0), ("2", "y", 0, 0, ""), ("3", "x", 9, "", "")]
    activity = read_rows(tmp_path / "f.csv", rows, "userid,version,sum_gamerounds,retention_1,retention_7")
    assert entries(activity) == {("1", 1): 1}
    assert activity.followed_U.tolist() == [7, 1, 0], "an empty cell is a day that has not passed"
    assert activity.total_U.tolist() == [7, 0, 9]
    assert (activity.days.tolist(), activity.unit, activity.by_day) == ([1, 7], "rounds", False)


def test_a_row_with_the_amount_0_is_a_user_but_no_visit(tmp_path):
    activity = read_rows(tmp_path / "f.csv", [("a", "x", 0, 0), ("b", "y", 0, 2)])
    assert activity.users == ["a", "b"] and entries(activity) == {("b", 0): 2}


def test_the_days_that_have_passed_may_have_a_column(tmp_path):
    rows = [("a", "x", 0, 9), ("a", "x", 3, 9), ("b", "y", 0, 2)]
    activity = read_rows(tmp_path / "f.csv", rows, "user,arm,day,followed")
    assert activity.followed_U.tolist() == [9, 2] and activity.days[-1] == 9


def test_users_in_two_arms_are_left_out_and_counted(tmp_path):
    rows = [("a", "x", 0, 1), ("b", "x", 0, 1), ("b", "y", 1, 1), ("c", "y", 1, 5)]
    activity = read_rows(tmp_path / "f.csv", rows)
    assert activity.users == ["a", "c"] and entries(activity) == {("a", 0): 1, ("c", 1): 5}
    assert activity.left_out == {"users with rows in two arms": 1}


def test_columns_are_named_by_options(tmp_path):
    path = write_rows(
        tmp_path / "f.csv", "who,which,when,seconds,arm", [("a", "x", 1, 5, "no"), ("b", "y", 0, 5, "no")]
    )
    activity = read_activity(path, ColumnsConfig(user="who", arm="which", day="when"))
    assert (
        activity.arms == ["x", "y"] and entries(activity) == {("a", 1): 5, ("b", 0): 5} and activity.unit == "seconds"
    )


def test_packed_files_other_separators_and_a_byte_order_mark_are_read(tmp_path):
    text = "\ufeffuser;arm;day\na;x;0\n\nb;y;1\n"
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert entries(read_activity(tmp_path / "f.csv.gz", ColumnsConfig())) == {("a", 0): 1, ("b", 1): 1}


def event(unit, arm, at, **more) -> dict:
    return {"id": f"{unit}-{at}", "at": at, "unit": unit, "arm": arm, "experiment": "spring", "exposed": True} | more


def write_events(path, events) -> object:
    path.write_text("".join(json.dumps(each) + "\n" for each in events))
    return path


def test_events_of_the_gateway_count_from_the_first_exposed_turn(tmp_path):
    events = [
        event("a", "x", T0 - DAY, exposed=False),
        event("a", "x", T0),
        event("a", "x", T0 + DAY, experiment="autumn"),
        event("a", "x", T0 + 2 * DAY),
        event("b", "y", T0 + 2 * DAY),
        event(None, "x", T0 + 2 * DAY),
        {"id": "plain", "at": T0 + 3 * DAY, "messages": []},
    ]
    activity = read_activity(write_events(tmp_path / "e.jsonl", events), ColumnsConfig(experiment="spring"))
    assert entries(activity) == {("a", 0): 1, ("a", 2): 1, ("b", 0): 1} and activity.unit == "turns"
    assert activity.left_out == {
        "turns that exposed nobody to an arm": 1,
        "rows outside of the experiment": 2,
        "turns without a user": 1,
    }


def test_names_are_one_line_without_invisible_characters(tmp_path):
    rows = [("a\nb", "\x1b[31mred", 0), (" c\u202e", "blue", 0)]
    activity = read_rows(tmp_path / "f.csv", rows, "user,arm,day")
    assert activity.arms == ["\\x1b[31mred", "blue"] and activity.users == ["a b", "c\\u202e"]


def test_users_can_be_chosen_and_repeated(tmp_path):
    activity = read_rows(tmp_path / "f.csv", visits(0, users=9))
    chosen = activity.of(np.array([4, 4, 1]))
    by_user = [
        {day: amount for (user, day), amount in entries(activity).items() if user == activity.users[i]}
        for i in (4, 4, 1)
    ]
    again: list[dict] = [{}, {}, {}]
    for user, day, amount in zip(chosen.user_E, chosen.day_E, chosen.amount_E):
        again[user][int(day)] = float(amount)
    assert again == by_user and chosen.users == ["u4", "u4", "u1"]


WRONG = {
    "no column for users": ("arm,day\nx,0\n", "no column names the user (usual names: user, userid, user_id, unit); its columns "
                            "are arm, day: give --user COLUMN"),
    "no column for arms": ("user,day\na,0\n", "no column names the arm"),
    "no column for time": ("user,arm,use\na,x,0\n", "no column says when a user was active"),
    "a date": ("user,arm,time\na,x,2023-11-30\nb,y,31/12/2026\n", "line 3: time '31/12/2026' is no time"),
    "a small number as time": ("user,arm,time\na,x,12\nb,y,13\n", "line 2: time '12' is no time"),
    "a negative day": ("user,arm,day\na,x,0\nb,y,-1\n", "line 3: day '-1' is negative"),
    "half a day": ("user,arm,day\na,x,0.5\n", "line 2: day '0.5' is no whole number"),
    "a time as day": (f"user,arm,day\na,x,{T0}\n", "if it is a date, give --time day"),
    "a day twice": ("user,arm,day,amount\na,x,0,1\nb,y,0,1\na,x,0,2\n", "line 4: user 'a' has a row for day 0 on line 2 already"),
    "a user twice": ("user,arm,retention_1\na,x,0\na,x,1\n", "line 3: user 'a' has a row on line 2 already"),
    "NaN": ("user,arm,day,amount\na,x,0,1\nb,y,0,nan\n", "line 3: amount 'nan' is not a number"),
    "infinity": ("user,arm,day,amount\na,x,0,inf\n", "line 2: amount 'inf' is not a number"),
    "no amount": ("user,arm,day,amount\n\na,x,0,\n", "line 3: amount is empty"),
    "a negative amount": ("user,arm,day,amount\na,x,0,-3\n", "line 2: amount is -3; it must be 0 or more"),
    "a short row": ("user,arm,day\na,x\n", "line 2: 2 values, but the header has 3 columns"),
    "no user": ("user,arm,day\n,x,0\n", "line 2: user is empty"),
    "two thirds retained": ("user,arm,retention_1\na,x,0.67\n", "line 2: retention_1 is '0.67'; it must be 0 or 1"),
    "a gap": ("user,arm,retention_1,retention_7\na,x,,1\n", "line 2: retention_1 is empty, but retention_7, a later day, is not"),
    "the day of joining only": ("user,arm,retention_0\na,x,1\n", "the only retention column is that of day 0"),
    "a column twice": ("user,arm,arm\na,x,y\n", "line 1: two columns are named 'arm'"),
    "an open quote": ('user,arm,day\n"a,x,0\n', "line 2: a quote is opened and never closed"),
    "a late quote": ('user,arm,day\na,x,0\n"b,y,0\nc,x,0\n', "line 3: a quote is opened and never closed"),
    "the year 2100": ("user,arm,time\na,x,2023-11-01\nb,y,2100-01-01\n", "line 3: time '2100-01-01' has not come yet"),
    "the year 9999": ("user,arm,time\na,x,9999-12-31\nb,y,2023-11-01\n", "line 2: time '9999-12-31' has not come yet"),
    "the year 1": ("user,arm,time\na,x,2023-11-01\nb,y,0001-01-01\n", "line 3: time '0001-01-01' is"),
    "line 7": (f"user,arm,time\n{5 * f'a,x,{T0}{chr(10)}'}b,y,soon\n", "line 7: time 'soon' is no time"),
    "a date as day": ("user,arm,day\na,x,2023-11-01\n", "line 2: day '2023-11-01' is a date; give --time day"),
    "a comment": ("# made by us\nuser,arm,day\na,x,0\n", "line 1 is '# made by us'; delete it"),
    "Excel's separator": ("sep=;\nuser;arm;day\na;x;0\n", "line 1 is 'sep=;'; delete it"),
    "an empty file": ("", "the file is empty"),
    "no rows": ("user,arm,day\n", "the file has no rows"),
    "too late": ("user,arm,day,followed\na,x,3,2\n", "line 2: day 3 of a user for whom 2 days have passed"),
}  # fmt: skip


@pytest.mark.parametrize("content, said", WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_one_line_with_file_and_row(tmp_path, content, said):
    (tmp_path / "f.csv").write_text(content)
    with pytest.raises(UserError) as caught:
        read_activity(tmp_path / "f.csv", ColumnsConfig())
    assert str(caught.value).startswith(f"{tmp_path / 'f.csv'}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_retention_columns_may_have_capitals(tmp_path):
    activity = read_rows(tmp_path / "f.csv", [("a", "x", 1), ("b", "y", 0)], "User,Arm,Retention_1")
    assert entries(activity) == {("a", 1): 1}
    with pytest.raises(UserError, match="line 2: Retention_1 is '7'"):
        read_rows(tmp_path / "f.csv", [("a", "x", 7)], "User,Arm,Retention_1")


@pytest.mark.parametrize("name", ["unit", "arm", "at", "id"])
@pytest.mark.parametrize("value, kind", [([1], "a list"), ({"a": 1}, "an object")])
def test_a_list_or_an_object_in_a_cell_is_named(tmp_path, name, value, kind):
    path = write_events(tmp_path / "e.jsonl", [event("a", "x", T0), event("b", "y", T0) | {name: value}])
    with pytest.raises(UserError, match=f"line 2: {name} is {kind}; it must be one value"):
        read_activity(path, ColumnsConfig())


WRONG_EVENTS = {
    "twice": (
        [event("a", "x", T0), event("a", "x", T0)],
        None,
        "line 2: the event 'a-1700000000' stands on line 1, too",
    ),
    "which": ([event("a", "x", T0), event("a", "x", T0, experiment="t")], None, "several experiments (spring, t)"),
    "unknown": ([event("a", "x", T0)], "sprung", "no experiment 'sprung'; did you mean 'spring'?"),
    "nobody": ([event(None, "x", T0)], None, "exposed a known user"),
    "no experiment": (
        [{"id": "1", "at": T0, "unit": "a", "arm": "x", "experiment": None}],
        None,
        "no row belongs to an",
    ),
}


@pytest.mark.parametrize("events, name, said", WRONG_EVENTS.values(), ids=WRONG_EVENTS)
def test_events_that_are_no_experiment_are_named(tmp_path, events, name, said):
    path = write_events(tmp_path / "e.jsonl", events)
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
        read_activity(path, ColumnsConfig(experiment=name))


@pytest.mark.parametrize(
    "content, said",
    [
        (b"user,arm\n\xe9,a\n", "line 2: the file is not UTF-8 text; convert it"),
        (gzip.compress(b"user,arm\n")[:-9], "damaged"),
        (b"PAR1\x15\x04", "is a Parquet file; write it as CSV"),
        (b"PK\x03\x04\x14\0", "is a zip archive or an Excel file; unpack it, or save the sheet as CSV"),
        (lzma.compress(b"user,arm\n"), "is packed with xz; unpack it with unxz"),
        ("user,arm\n".encode("utf-16"), "is UTF-16; convert it first"),
        ("user,arm\n".encode("utf-16-le"), "is a binary file or UTF-16"),
    ],
    # Bytes as a name would differ between the processes that collect the tests: gzip writes the time into its header.
    ids=["latin-1", "cut gzip", "Parquet", "zip", "xz", "UTF-16", "UTF-16-LE"],
)
def test_files_that_are_no_text_are_named(tmp_path, content, said):
    (tmp_path / "f.csv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_activity(tmp_path / "f.csv", ColumnsConfig())
