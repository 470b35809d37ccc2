"""Run the cleaner's work on a Ray cluster, for dumps that one machine is too slow for.

    python -m cleaning dump.jsonl -o out --ray               starts Ray on this machine
    python -m cleaning dump.jsonl -o out --ray auto          the cluster that this machine belongs to
    python -m cleaning dump.jsonl -o out --ray ray://head:10001

This process reads the dumps, decides about duplicates and writes (at 100 MB/s and more). Ray tasks convert and split the
shards. They use the same functions as worker processes, in the same order. So the result is the same byte for byte, memory
stays bounded, and an interrupted run continues as on one machine. (Ray Data, which holds shards as a dataset, has no place
for a log that is written in order and continued.)

This needs `pip install "fastft[cluster]"`, the same versions on every node, and the files that options name (--against,
--filters, --model) at the same paths on every node.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastft.errors import UserError, is_ours


class RayPool:
    """Ray tasks as a `fastft.common.workers.Pool`."""

    def __init__(self, ray: Any, ahead: int):
        self.ray, self.ahead = ray, ahead
        self.call = ray.remote(_call)
        # id(function) -> (function, reference to it). Each is sent to the cluster once. It is kept here, so that its id()
        # cannot become that of another function.
        self.functions: dict[int, tuple[Callable, Any]] = {}

    def submit(self, function: Callable, batch: Any) -> "_Result":
        if id(function) not in self.functions:
            self.functions[id(function)] = function, self.ray.put(function)
        return _Result(self.ray, self.call.remote(self.functions[id(function)][1], batch))


class _Result:
    def __init__(self, ray: Any, reference: Any):
        self.ray, self.reference = ray, reference

    def result(self) -> Any:
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error  # raise what the function raised, and show the task's traceback as its cause


def _call(function: Callable, batch: Any) -> Any:
    return function(batch)


@contextmanager
def ray_pool(address: str, workers: int | None) -> Iterator[RayPool]:
    """Connect to the cluster at `address`; "" starts one on this machine, with `workers` cores.

    Raises UserError if Ray is not installed or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise UserError('--ray needs Ray: pip install "fastft[cluster]"') from None
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        else:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    except Exception as error:  # Ray raises a dozen kinds for an address where nobody answers
        if is_ours(error):
            raise
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--ray {address}: no Ray cluster ({line})") from None
    try:
        yield RayPool(ray, 2 * int(ray.cluster_resources().get("CPU", 1)))
    finally:
        ray.shutdown()
