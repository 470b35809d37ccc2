"""Have a model answer questions: `fastft answer [QUESTIONS] --model DIR|URL#name -o answers.jsonl`.

    fastft answer --model runs/first/model -o first.jsonl                       # a Hugging Face directory, on GPU or CPU
    OPENAI_API_KEY=… fastft answer --model https://api.openai.com/v1#gpt-4.1 -o gpt.jsonl

Run again with the same file it asks only what is missing or failed. Later turns of a question follow the model's own answers to
the earlier ones; what an endpoint said to those is kept in answers.cache.jsonl, beside. Each row records the model's address or
a digest of its directory, parameters, seconds, tokens and why the answer ended.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import urlsplit

from fastft.errors import UserError
from fastft.inference.budget import Money
from fastft.inference.client import Cache, Client, Limits, Unanswered, estimate_tokens, run_all
from fastft.judge.judgment import write_rows
from fastft.judge.questions import OWN, Answer, Question, load_questions, read_answers


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 where something is still missing."""
    parser = argparse.ArgumentParser(prog="fastft answer", description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="?", default=str(OWN), help="JSON Lines; without, our own 80")
    parser.add_argument("-o", "--output", required=True, help="answers, JSON Lines; what is there already is kept")
    add_model_options(parser, max_tokens=1024)
    add_endpoint_options(parser, "model")
    arguments = parser.parse_args(argv)
    return answer(arguments)


def add_model_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Who answers, and how, for verbs that ask a model; limits and prices of endpoints come with `add_endpoint_options`."""
    parser.add_argument(
        "--model", required=True, help="a model's directory, or URL#name of an OpenAI-compatible endpoint"
    )
    parser.add_argument("--name", help="the model's name in tables; by default its directory's or endpoint's")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max_tokens", type=int, default=max_tokens, help="length of an answer")
    parser.add_argument("--batch_size", type=int, default=16, help="questions at a time, of a local model")
    parser.add_argument("--dry_run", action="store_true", help="say what would be asked and cost")


def add_endpoint_options(parser: argparse.ArgumentParser, address: str) -> None:
    """Keys, limits and prices, for verbs that ask endpoints; `address` is the option that names those."""
    options = parser.add_argument_group("endpoints", "OPENAI_API_KEY is for OpenAI and OPENAI_BASE_URL alone")
    options.add_argument(
        f"--{address}_key_env",
        action="append",
        default=[],
        dest="key_env",
        metavar="NAME",
        help=f"the environment variable with the key for --{address}; for several, one each, '' for none",
    )
    options.add_argument("--concurrency", type=int, default=Limits.concurrency, help="requests at a time")
    options.add_argument("--rpm", type=float, default=0, help="requests a minute, 0: no limit")
    options.add_argument("--tpm", type=float, default=0, help="tokens a minute, 0: no limit")
    options.add_argument("--timeout", type=float, default=Limits.timeout_s, help="seconds for one request")
    options.add_argument(
        "--usd_per_million",
        action="append",
        metavar="IN,OUT",
        help="price of a million prompt and reply tokens, 2.5,10",
    )
    options.add_argument("--max_usd", type=float, help="stop before more than this is spent; needs --usd_per_million")


def endpoint_limits(arguments: argparse.Namespace) -> Limits:
    if arguments.concurrency < 1 or arguments.rpm < 0 or arguments.tpm < 0 or arguments.timeout <= 0:
        raise UserError("--concurrency must be at least 1, --rpm and --tpm not below 0, --timeout above 0")
    return Limits(arguments.concurrency, arguments.rpm, arguments.tpm, timeout_s=arguments.timeout)


def endpoint_keys(names: list[str], addresses: list[str]) -> list[str]:
    """The variable with the key for each address, "" where none is named. Raises UserError.

    One name for several addresses holds where they are one host: no key goes where nobody sent it.
    """
    if not all(re.fullmatch(r"(?:[A-Za-z_]\w*)?", name) for name in names):
        raise UserError("a key is given by the name of the environment variable that holds it")
    if len(names) == 1 and len({urlsplit(address).netloc for address in addresses}) == 1:
        return names * len(addresses)
    if names and len(names) != len(addresses):
        raise UserError("a key's variable must be named once for each endpoint ('' for none), or all must be one host")
    return names or [""] * len(addresses)


def endpoint_prices(arguments: argparse.Namespace, number: int) -> list[tuple[float, float]]:
    """A price for each of `number` endpoints; one price holds for all. Raises UserError."""
    given = arguments.usd_per_million or []
    if arguments.max_usd is not None and not given:
        raise UserError("--max_usd needs --usd_per_million IN,OUT: prices are not known here")
    try:
        prices = [tuple(float(part) for part in text.split(",")) for text in given]
    except ValueError:
        prices = [()]
    if arguments.max_usd is not None and not arguments.max_usd > 0:
        raise UserError("--max_usd must be above 0")
    whole = all(len(price) == 2 and all(0 <= usd < math.inf for usd in price) for price in prices)
    if not whole or len(prices) not in (0, 1, number):
        raise UserError("--usd_per_million must be IN,OUT in dollars, once, or once for each endpoint")
    return prices * number if len(prices) == 1 else prices or [(0.0, 0.0)] * number


def answer(arguments: argparse.Namespace) -> int:
    """Answer what is not answered yet. Raises UserError for the user's mistakes."""
    questions = load_questions(arguments.questions)
    done, usd = answer_all(questions, arguments)
    if not arguments.dry_run:
        name = next(iter(done.values())).model
        print(f"{arguments.output}: {len(done)} answers of {name}{f', ${usd:.2f}' if usd else ''}")
    return 0


def answer_all(questions: list[Question], arguments: argparse.Namespace) -> tuple[dict[str, Answer], float]:
    """Answers by question, those of earlier starts with them, and the dollars spent now; nothing in a dry run.

    `arguments` are this verb's. Raises UserError for the user's mistakes, and where questions are left: what is answered
    lies in `arguments.output`, and the next call goes on.
    """
    for option, least in (("max_tokens", 1), ("batch_size", 1), ("temperature", 0)):
        if not getattr(arguments, option) >= least:
            raise UserError(f"--{option} must be at least {least}")
    remote = arguments.model.startswith(("http://", "https://"))
    name = arguments.name or (arguments.model.partition("#")[2] if remote else Path(arguments.model).resolve().name)
    path = Path(arguments.output)
    parameters = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens}
    money = Money(arguments.max_usd)
    client = None
    if remote:
        cache, price = Cache(path.with_suffix(".cache.jsonl")), endpoint_prices(arguments, 1)[0]
        (key_env,) = endpoint_keys(arguments.key_env, [arguments.model])
        client = Client(arguments.model, endpoint_limits(arguments), cache, price, money, key_env)
    source = f"{client.url}#{client.name}" if client else fingerprint(Path(arguments.model))
    made_with = {"model": source, **parameters}
    done = answered_before(path, name, made_with, questions)
    missing = [question for question in questions if question.id not in done]
    print(f"{name}: {len(missing)} of {len(questions)} questions to answer", file=sys.stderr)
    if arguments.dry_run:
        prompt = sum(estimate_tokens([{"content": turn}]) for question in missing for turn in question.turns)
        most = arguments.max_tokens * sum(len(question.turns) for question in missing)
        usd = f", at most ${client.usd(prompt, most):.2f}" if client and arguments.usd_per_million else ""
        print(
            f"would ask {sum(len(q.turns) for q in missing)} turns: {prompt:,} prompt tokens, at most {most:,} reply tokens{usd}"
        )
        return {}, 0.0
    stopped = None
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:  # a row as soon as it is there: a killed run has lost no answer

            def keep(index: int, answer: Answer) -> None:
                done[answer.question_id] = answer = replace(answer, parameters=made_with)
                file.write((json.dumps(asdict(answer), ensure_ascii=False) + "\n").encode())

            if client:
                works = [lambda question=question: ask(client, name, question, parameters) for question in missing]
                stopped = run_all(works, "answering", money, keep)
            else:
                for answer in generate(arguments.model, name, missing, parameters, arguments.batch_size):
                    keep(0, answer)
    if done:  # in the questions' order, each once
        write_rows(path, [done[question.id] for question in questions if question.id in done])
    failed = [answer for answer in done.values() if answer.error]
    left = len(questions) - len(done) + len(failed)
    if stopped or left:
        why = f" ({stopped})" if stopped else f" ({failed[0].question_id}: {failed[0].error})" if failed else ""
        raise UserError(f"{left} of {len(questions)} questions are not answered{why}; run the same command again")
    return done, money.spent


def fingerprint(directory: Path) -> str:
    """Of a model's weights, by 64 pieces of each file: `model` is the last name of every run's directory."""
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for piece in range(64):
                file.seek(size * piece // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:12]


def answered_before(path: Path, name: str, parameters: dict, questions: list[Question]) -> dict[str, Answer]:
    """The good answers of an earlier start. Raises UserError when they are another model's, or were made otherwise."""
    if not path.exists() or not path.stat().st_size:
        return {}
    cut_torn_line(path)
    if not path.stat().st_size:
        return {}
    known, found = {question.id for question in questions}, {}
    for answer in read_answers(path):
        if answer.model != name:
            raise UserError(f"{path}: holds answers of {answer.model}; give those of {name} another file")
        if answer.question_id not in known:
            raise UserError(
                f"{path}: answers question {answer.question_id}, which is not asked here; give another file"
            )
        if answer.parameters != parameters:
            raise UserError(f"{path}: was made with {answer.parameters}, and now it is {parameters}; give another file")
        if not answer.error:
            found[answer.question_id] = answer
    return found


def cut_torn_line(path: Path) -> None:
    """Remove what a killed run had not written to its line's end."""
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


async def ask(client: Client, name: str, question: Question, parameters: dict) -> Answer:
    """All turns of a question, from an endpoint; an answer with `error` where it failed for good."""
    messages, replies = [], []
    try:
        for turn in question.turns:
            messages.append({"role": "user", "content": turn})
            replies.append(await client.ask(messages, **parameters))
            messages.append({"role": "assistant", "content": replies[-1].text})
    except Unanswered as error:
        return Answer(question.id, name, (), parameters, error=str(error))
    empty = [number for number, reply in enumerate(replies, 1) if not reply.text.strip()]
    return Answer(
        question.id,
        name,
        tuple(reply.text for reply in replies),
        parameters,
        round(sum(reply.seconds for reply in replies), 3),
        sum(reply.prompt_tokens for reply in replies),
        sum(reply.completion_tokens for reply in replies),
        replies[-1].finish_reason if not empty else f"empty answer to turn {empty[0]}",
    )


def generate(model: str, name: str, questions: list[Question], parameters: dict, batch_size: int) -> Iterator[Answer]:
    """From a local model, a batch of questions at a time; questions of like length share a batch."""
    from rich.console import Console
    from rich.progress import track

    from fastft.data.conversation import Message
    from fastft.inference.engine import ChatModel

    chat = ChatModel(model)
    questions = sorted(questions, key=lambda question: (len(question.turns), sum(map(len, question.turns))))
    batches = []
    for question in questions:  # all of a batch have as many turns
        if not batches or len(batches[-1]) == batch_size or len(batches[-1][0].turns) != len(question.turns):
            batches.append([])
        batches[-1].append(question)
    for batch in track(batches, "answering", console=Console(stderr=True)):
        began = time.monotonic()
        dialogues = [[] for _ in batch]
        prompt, completion, reasons = [0] * len(batch), [0] * len(batch), [None] * len(batch)
        for turn in range(len(batch[0].turns)):
            for dialogue, question in zip(dialogues, batch):
                dialogue.append(Message("user", question.turns[turn]))
            replies = chat.answer_batch(dialogues, parameters["max_tokens"], parameters["temperature"])
            for i, reply in enumerate(replies):
                dialogues[i].append(Message("assistant", reply.text))
                prompt[i], completion[i] = prompt[i] + reply.prompt_tokens, completion[i] + reply.completion_tokens
                reasons[i] = reply.finish_reason
        seconds = round((time.monotonic() - began) / len(batch), 3)
        for question, dialogue, *counts in zip(batch, dialogues, prompt, completion, reasons):
            answers = tuple(message.content for message in dialogue if message.role == "assistant")
            yield Answer(question.id, name, answers, parameters, seconds, *counts)
