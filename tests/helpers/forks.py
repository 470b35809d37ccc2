"""Python processes that are forked from one that has imported torch and the trainer, so that each start saves 3 s of imports.

    done = forks.run(["-m", "fastft.train", "--model", …])              # as subprocess.run([sys.executable, …])
    process = forks.Process(["-c", code], stderr=subprocess.PIPE)       # as subprocess.Popen

They are processes of their own, with their own environment, session, signals and exit code, and what they run is their
`__main__`. That the real command starts, too, is tested with torchrun, whose workers are started from nothing.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NoReturn

PRELOADED = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
    "fastft.cli",
    "fastft.train.loop",
)


class Process:
    """A process, with what tests use of subprocess.Popen. It leads a session of its own."""

    def __init__(
        self,
        arguments: Sequence[Any],
        stdout: int | IO | None = None,
        stderr: int | IO | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike = ".",
    ):
        """`arguments` are those of Python: -m MODULE, -c CODE or a script, and what follows. `env`: the whole environment."""
        self.args = [str(argument) for argument in arguments]
        self.returncode: int | None = None
        request = {"target": self.args, "env": dict(env or os.environ), "cwd": os.path.abspath(cwd)}
        with contextlib.ExitStack() as at_end:
            nothing = at_end.enter_context(open(os.devnull))
            self._status, status = os.pipe()
            at_end.callback(os.close, status)
            self.stdout, out = _connected(stdout, 1, at_end)
            self.stderr, err = _connected(stderr, 2, at_end)
            fds = [nothing.fileno(), out, err, status]
            socket.send_fds(_server(), [json.dumps(request).encode()], fds)
        self._said = ""
        while "\n" not in self._said:
            self._said += os.read(self._status, 100).decode()
        self.pid = int(self._said.split()[0])

    def poll(self) -> int | None:
        """The exit code, a signal's number negated, or None while the process runs."""
        while self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._read()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        while self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._read()
        return self.returncode

    def _read(self) -> None:
        said = os.read(self._status, 100).decode()
        self._said += said
        if self._said.count("\n") == 2:
            self.returncode = int(self._said.split()[1])
            os.close(self._status)
        else:
            assert said, "the server of forks is gone"

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run(arguments: Sequence[Any], timeout: float = 240, **options) -> subprocess.CompletedProcess:
    """Run to the end. Returns exit code, stdout and stderr as text; a process that takes longer is killed."""
    # Pipes and no files: a limit on the size of files, which tests set, would be one on what is said, too.
    process = Process(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    with ThreadPoolExecutor(2) as readers, process.stdout, process.stderr:
        said = [readers.submit(stream.read) for stream in (process.stdout, process.stderr)]
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, *(each.result() for each in said))


def _connected(to: int | IO | None, number: int, at_end: contextlib.ExitStack) -> tuple[IO | None, int]:
    """(our end of a pipe if one is asked for, the descriptor for the process) of its output `number`."""
    if to == subprocess.PIPE:
        ours, theirs = os.pipe()
        at_end.callback(os.close, theirs)
        return open(ours, encoding="utf-8", errors="replace"), theirs
    return None, number if to is None else to if isinstance(to, int) else to.fileno()


_servers: list[socket.socket] = []


def _server() -> socket.socket:
    """The connection to this process's server, which ends with it."""
    if not _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        _servers.append(ours)
    return _servers[0]


def _serve(connection: socket.socket) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which is for pytest
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait
    while True:
        message, fds, *_ = socket.recv_fds(connection, 1 << 20, 4)
        if not message:
            return
        if os.fork() == 0:
            connection.close()
            _fork_and_wait(json.loads(message), fds)
        for descriptor in fds:
            os.close(descriptor)


def _fork_and_wait(request: dict, fds: list[int]) -> NoReturn:
    """Fork the process that was asked for, and write its number, and then how it ended, as lines to the last of `fds`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, status = fds
    os.setsid()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(status)
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["env"])
        sys.path[1:1] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
        os.chdir(request["cwd"])
        become_main(request["target"])
    for descriptor in streams:
        os.close(descriptor)
    os.write(status, f"{pid}\n".encode())
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def become_main(target: Sequence[str]) -> NoReturn:
    """Run `-m MODULE …`, `-c CODE …` or `SCRIPT …` as Python itself would, and end this process."""
    code = 1
    try:
        if target[0] == "-m":
            sys.argv, sys.path[0] = [*target[1:]], os.getcwd()
            runpy.run_module(target[1], run_name="__main__", alter_sys=True)
        elif target[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *target[2:]], ""
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(target[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv, sys.path[0] = [*target], os.path.dirname(os.path.abspath(target[0]))
            runpy.run_path(target[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  an exception would leave this process in the loop of its parent
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # where a script of tests/helpers finds the others
    _serve(socket.socket(fileno=int(sys.argv[1])))
