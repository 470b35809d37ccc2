"""A run that asks a file of rows: what a verb does with the client, and nothing else. It is started as a process, to be killed.

    python asking.py ROWS.jsonl URL#name DIRECTORY [--batch] [--quick] [--concurrency 8]

DIRECTORY/cache.jsonl is the client's; DIRECTORY/answers.jsonl is written at the end, in the order of the rows.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastft.common.command_line import option, parse
from fastft.common.files import write_whole
from fastft.inference import batch
from fastft.inference.budget import Cache, Money
from fastft.inference.client import Client, Unanswered, run_all
from fastft.inference.endpoint import Limits


@dataclass
class AskingConfig:
    rows: Path = option(positional=True)
    address: str = option(positional=True)
    directory: Path = option(positional=True)
    batch: bool = False
    quick: bool = False
    """Wait less for batches."""
    concurrency: int = 8


def main() -> int:
    [options] = parse(sys.argv[1:], "asking.py", "Ask a file of rows.", AskingConfig)
    if options.quick:
        batch.IDLE_S, batch.FIRST_POLL_S, batch.LAST_POLL_S, batch.GRACE_S = 0.1, 0.05, 0.1, 1.0
    money, found = Money(), {}
    cache = Cache(options.directory / "cache.jsonl")
    client = Client(options.address, Limits(options.concurrency), cache, (1.0, 1.0), money, batch=options.batch)

    async def ask(row: dict) -> dict:
        try:
            reply = await client.ask([{"role": "user", "content": row["query"]}], temperature=0, max_tokens=256)
            return {"id": row["id"], "answer": reply.text, "finish_reason": reply.finish_reason}
        except Unanswered as error:
            return {"id": row["id"], "error": str(error)}

    with open(options.rows) as file:
        works = (partial(ask, json.loads(line)) for line in file)
        stopped = run_all(works, "asking", money, found.__setitem__)
    write_whole(options.directory / "answers.jsonl", "".join(json.dumps(found[i]) + "\n" for i in sorted(found)))
    cache.close()
    if stopped:
        print(stopped, file=sys.stderr)
    return bool(stopped)


if __name__ == "__main__":
    raise SystemExit(main())
