"""Money whose account is a file: a limit that holds over all starts of a run, kill -9 included.

    money = KeptMoney(Path("grimoires/trec/spent.jsonl"), limit=1.0)

A reserve is written before its request is sent, and what it cost afterwards. A reserve without an end is of a request that was
in flight when the run was killed: it counts as spent, because the endpoint may bill it.
"""

import json
from pathlib import Path

from fastft.common.files import require_place
from fastft.inference.budget import Money


class KeptMoney(Money):
    def __init__(self, path: Path, limit: float | None = None):
        """Read what earlier starts have spent."""
        super().__init__(limit)
        self.path, self.file = path, None
        self.spent = _spent_in(path)

    def commit(self, usd: float) -> None:
        super().commit(usd)
        if usd:
            self._write({"reserved": usd})

    def settle(self, reserved: float, usd: float) -> None:
        super().settle(reserved, usd)
        if reserved:
            self._write({"reserved": -reserved, "spent": usd})

    def _write(self, row: dict[str, float]) -> None:
        if self.file is None:
            require_place(self.path)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  it stays open as long as the run
            if self.file.tell():
                self.file.write(b"\n")  # the last line may have been cut
        self.file.write(json.dumps(row).encode() + b"\n")


def _spent_in(path: Path) -> float:
    """Return what was spent, with the reserves that were never settled."""
    spent = 0.0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # a line that was cut by a kill: its request was not sent, or its reserve stays
            continue
        spent += row.get("reserved", 0.0) + row.get("spent", 0.0)
    return max(spent, 0.0)
