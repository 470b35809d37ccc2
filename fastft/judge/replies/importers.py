"""Read the judgments of others as our own: `fastft judge --reviews FILE|DIR … --scores field|text`.

A judgment has the judge's words and, in most forms, a field with what its authors' own parser or people made of them. "field"
takes the field, "text" reads the words where there are any, and both name every row in which the two differ. Whose rows they
are, their keys say (`fastft.judge.replies.forms`). Nothing is left out silently: rows that are no judgments, and judgments
that could not be read, are counted with the reason.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.common.records import read_records
from fastft.errors import UserError
from fastft.judge.judgment import Judgment, Reading, better, held
from fastft.judge.questions import Answer, Question, load_questions, turns_of
from fastft.judge.replies.forms import File, Look, Unread, file_of, plain, read_row
from fastft.judge.replies.parsing import is_refusal
from fastft.judge.rows import repaired

ENDINGS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
NO_REPLIES = ("error", "$ERROR$")  # what QLoRA and FastChat keep in place of one
MOST_CONTRADICTIONS = 20  # that are named; all are flagged


@dataclass
class _Remarks:
    """What a reader must know about the rows. Counts by (file, reason), with the place of the first."""

    left_out: Counter = field(default_factory=Counter)
    unread: Counter = field(default_factory=Counter)
    first: dict[tuple[str, str], str] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    swapped: Counter = field(default_factory=Counter)
    unchecked: Counter = field(default_factory=Counter)
    """Reviews by file, where the file's name alone says which answer was shown first."""

    def count(self, counter: Counter, file: File, why: str, place: str) -> None:
        counter[file.path.name, why] += 1
        self.first.setdefault((file.path.name, why), place)

    def lines(self) -> list[str]:
        lines = [f"contradiction: {line}" for line in self.contradictions[:MOST_CONTRADICTIONS]]
        if (more := len(self.contradictions) - MOST_CONTRADICTIONS) > 0:
            lines.append(f"contradiction: … and {more:,} more; all are flagged")
        for (name, shown), count in self.swapped.items():
            lines.append(f"contradiction: {name}: the ids of {count} answers say that {shown}; they are believed")
        if self.unchecked:
            others = f" and {len(self.unchecked) - 1} other files" if len(self.unchecked) > 1 else ""
            lines.append(
                f"unchecked: {sum(self.unchecked.values()):,} reviews in {next(iter(self.unchecked))}{others}: no answers have "
                "their ids (--answers), so the file's name alone says which was shown first"
            )
        for (name, why), count in self.left_out.items():
            lines.append(f"left out: {name}: {count:,} rows, {why} (first: {self.first[name, why]})")
        for (name, why), count in self.unread.items():
            lines.append(f"unparsed: {name}: {count:,}, because {why} (first: {self.first[name, why]})")
        return lines


def read_reviews(
    paths: Sequence[Path],
    scores: str,
    questions: Path | None = None,
    answers: Sequence[Path] = (),
    baseline: str | None = None,
) -> tuple[list[Judgment], list[str], list[Question], list[Answer]]:
    """Return the judgments in files and directories, remarks about them, questions and answers.

    Questions and answers that are not given are looked for where the originals have them: question.jsonl, answer/ and
    model_answer/ beside the judgments or up to two directories above. `baseline` is the name of Arena-Hard's baseline, which
    its older rows do not have. Raises UserError if nothing is a judgment.
    """
    files = [file for path in paths for file in _files(path)]
    places = list(dict.fromkeys(place for path in paths for place in _places(path)))
    remarks, judgments, looks = _Remarks(), [], []
    asked = {question.id: question for question in _questions(places, questions, remarks)}
    rows = [*_answer_rows(answers or _answer_files(places))]
    names_of_ids = {str(row["answer_id"]): names for names, row in rows if row.get("answer_id")}
    known = {name for names, _ in rows for name in names}
    for path in files:
        file = file_of(path, known, names_of_ids, baseline)
        for look in _looks(file, remarks):
            looks.append(look)
            judgments.append(_judgment(look, scores, asked, file, remarks))
    if not judgments:
        name, why = next(iter(remarks.left_out), (str(paths[0]), "no rows"))
        raise UserError(f"{remarks.first.get((name, why), name)}: holds no judgments: {why}")
    models = {name for look in looks for name in look.models}
    given = {(each.question_id, each.model): each for each in _answers(rows, models)}
    for look in looks:
        if look.question_turns:
            asked.setdefault(look.question, Question(look.question, look.category or "all", look.question_turns))
        for model, turns in zip(look.models, look.answer_turns):
            given.setdefault((look.question, model), Answer(look.question, model, turns))
    return judgments, remarks.lines(), list(asked.values()), list(given.values())


def _files(path: Path) -> list[Path]:
    """Return a file, or the files of a directory, or of the directories in it if it has none itself."""
    if not path.is_dir():
        return [path]
    for inside in (path.glob("*"), path.glob("*/*")):
        found = [each for each in sorted(inside) if each.name.endswith(ENDINGS) and each.name != "question.jsonl"]
        if found:
            return found
    raise UserError(f"{path}: holds no files of judgments ({', '.join(ENDINGS[:3])})")


def _looks(file: File, remarks: _Remarks) -> Iterator[Look]:
    for record in read_records(file.path):
        try:
            if record.error or not isinstance(record.value, dict):
                raise Unread(record.error or "no JSON objects")
            looks = read_row(repaired(record.value), file, record.where)
        except Unread as error:
            remarks.count(remarks.left_out, file, str(error), record.where)
            continue
        for look in looks:
            ids = {str(record.value.get(key)) for key in ("answer1_id", "answer2_id")} - {"None"}
            if ids and not ids & file.names_of_ids.keys():
                remarks.unchecked[file.path.name] += 1
            if ids and look.models != file.named and file.named:
                same = {*look.models} == {*file.named}
                shown = f"{look.models[0]} was shown first" if same else "it is about {} and {}".format(*look.models)
                remarks.swapped[file.path.name, shown] += 1
        yield from looks


def _judgment(look: Look, scores: str, questions: dict[str, Question], file: File, remarks: _Remarks) -> Judgment:
    """Make a judgment of a look, and take a remark if its field and words differ, or if it says nothing."""
    if look.whole:
        return look.whole
    read = look.read
    reading = look.entered if scores == "field" or look.asked is None or not look.text.strip() else read
    flags = list(look.flags)
    if differ := read is not None and look.entered is not None and not _same(read, look.entered):
        flags.append("contradiction")
        said, entered = _shown(read), _shown(look.entered)
        remarks.contradictions.append(
            f"{file.path.name}, question {look.question}: the text says {said}, the field {entered}"
        )
    if reading is None and not differ:
        place = f"question {look.question}" + (f": “…{look.text.strip()[-60:]}”" if look.text.strip() else "")
        remarks.count(remarks.unread, file, _why_unread(look, scores), " ".join(place.split()))
        flags += ["refusal"] * is_refusal(look.text)
    known = questions.get(look.question)
    return Judgment(
        question_id=look.question,
        category=known.category if known else look.category or "all",
        mode="pairwise" if len(look.models) == 2 else "single",
        judge=look.judge,
        model_a=look.models[0],
        model_b=look.models[1] if len(look.models) == 2 else None,
        text=look.text,
        turn=look.turn,
        referenced=look.referenced,
        flags=tuple(flags),
        **held(reading),
    )


def _same(read: Reading, entered: Reading) -> bool:
    """Return whether words and field say the same; a field may have the verdict alone where the words have scores."""
    if type(read) is type(entered):
        return read == entered
    scores, verdict = (read, entered) if isinstance(read, tuple) else (entered, read)
    return better(scores) == verdict


def _shown(reading: Reading) -> str:
    return " : ".join(f"{each:g}" for each in reading) if isinstance(reading, tuple) else reading


def _why_unread(look: Look, scores: str) -> str:
    if scores == "field" or look.asked is None or not look.text.strip():
        return "there is no result in the field"
    if look.text.strip() in NO_REPLIES:
        return "its authors got no reply"
    if is_refusal(look.text):
        return "the judge refused"
    return "the words give no score or verdict that can be read in one way only"


def _places(path: Path) -> list[Path]:
    """Return where questions and answers may lie: in the directory of the judgments, and in the two above it."""
    directory = path if path.is_dir() else path.parent
    return [directory, *directory.resolve().parents[:2]]


def _questions(places: list[Path], given: Path | None, remarks: _Remarks) -> list[Question]:
    if given:
        return load_questions(given)
    path = next((place / "question.jsonl" for place in places if (place / "question.jsonl").is_file()), None)
    try:
        return load_questions(path) if path else []
    except UserError as error:  # nobody asked for this file
        remarks.count(remarks.left_out, File(path), "no questions that can be read", str(error))
        return []


def _answer_files(places: list[Path]) -> list[Path]:
    """Return the files in the first directory of answers that has any."""
    inside = (sorted((place / name).glob("*.jsonl")) for place in places for name in ("answer", "model_answer"))
    return next((found for found in inside if found), [])


def _answer_rows(paths: Iterable[Path]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield (names that its model goes by, row) of every answer: the file's name, because reviews use it, and its own."""
    for path in paths:
        stem = path.name.split(".jsonl")[0].removeprefix("answer_")
        for record in read_records(path):
            row = record.value
            if isinstance(row, dict) and turns_of(row):
                own = row.get("model") or row.get("model_id")
                yield [stem, *([own] if isinstance(own, str) and own != stem else [])], row


def _answers(rows: Iterable[tuple[list[str], dict[str, Any]]], models: set[str]) -> Iterator[Answer]:
    """Yield the answers of the judged models."""
    judged = {plain(model): model for model in models}
    for names, row in rows:
        identity = next((row[key] for key in ("question_id", "message_id", "uid") if key in row), None)
        if identity is not None and (
            name := next((judged[plain(name)] for name in names if plain(name) in judged), None)
        ):
            yield Answer(str(identity), name, tuple(turns_of(row)))
