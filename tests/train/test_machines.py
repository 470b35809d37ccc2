"""A run on two machines: two torchrun agents on loopback, each with an output directory of its own, and one storage."""

import os
import shutil
import subprocess
import sys
import time

import pytest
from helpers import storage
from helpers.ports import free_port
from helpers.training import flags, losses, train, weights

from fastft.common.object_store import Store
from fastft.train.checkpoint.remote import checkpoints

# The upload of step 4 begins at once and is waited for; one that waits itself is dropped for a newer one.
STEPS = ["--max_steps", "6", "--checkpoint.every", "4", "--trackers", "none"]


def train_on_two(ground, outs, remote: str) -> list[str]:
    """One process on each machine, with its own output directory of `outs`; what each of them said."""
    place = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    nodes = []
    for number, out in enumerate(outs):
        agent = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *place,
            "--node-rank",
            str(number),
            "-m",
            "fastft.train",
        ]
        command = [*agent, *flags(ground, out, *STEPS, "--checkpoint.keep", "3", "--checkpoint.remote", remote)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (out.parent / f"{out.name}.log").open("w") as log:
            nodes.append(subprocess.Popen(command, stderr=log, env=environment))
    codes: list[int | None] = [None, None]
    end = time.monotonic() + 240
    while (
        None in codes and not any(codes) and time.monotonic() < end
    ):  # a node that has lost the other one may wait for long
        time.sleep(0.2)
        codes = [node.poll() for node in nodes]
    for node in nodes:
        node.terminate()
        node.wait()
    said = [(out.parent / f"{out.name}.log").read_text() for out in outs]
    assert codes == [0, 0], "\n".join(said)
    return said


def shards(out) -> set[str]:
    return {path.name for path in (out / "checkpoints/step-00000004").glob("*.distcp")}


@pytest.fixture(scope="module")
def whole(ground, tmp_path_factory):
    """The output directories of an uninterrupted run: with both processes on one machine, and with one on each of two."""
    place = tmp_path_factory.mktemp("whole")
    reference, outs = place / "reference", [place / "a", place / "b"]
    assert train(ground, reference, *STEPS, processes=2).returncode == 0
    with storage.s3():
        train_on_two(ground, outs, "s3://runs/whole")
        yield reference, outs


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_each_machine_fetches_what_it_does_not_have(ground, whole, tmp_path, kept):
    """After step 4 the disks of the first `kept` machines are kept, with the files that they have written.

    Also what others have written: the optimizer's counts of steps, which all read, are in some process's file.
    """
    reference, outs = whole
    assert [shards(out) for out in outs] == [{"__0_0.distcp"}, {"__1_0.distcp"}]
    source, target = Store("s3://runs/whole"), Store(f"s3://runs/lost-{kept}")
    for name, meta in checkpoints(source).found:
        if meta["step"] <= 4:
            source.fs.copy(f"{source.root}/{name}", f"{target.root}/{name}", recursive=True)
    again = [tmp_path / "a", tmp_path / "b"]
    for number in range(kept):
        place = "checkpoints/step-00000004"
        shutil.copytree(outs[number] / place, again[number] / place)
    said = train_on_two(ground, again, target.url)
    assert f"resumed: step 4 from {again[0]}" in said[0] and "passed over" not in said[0], said
    fetched = 1 if kept else len(checkpoints(source).found[0][1]["files"])
    assert f"fetching {fetched} of its files, " in said[0] and "it from storage" not in said[0], said
    assert [shards(out) for out in again] == [{"__0_0.distcp", "__1_0.distcp"}] * 2
    assert losses(again[0]) == losses(reference) == losses(outs[0])
    expected, found = weights(reference), weights(again[0])
    assert all((expected[name] == found[name]).all() for name in expected)
