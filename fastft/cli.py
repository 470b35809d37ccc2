"""The `fastft` command: each verb is a thin door to one module, imported only when it is called.

fastft --help
fastft VERB --help
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable

VERBS = {
    "demo": ("fastft.demo", "run the whole road on a small dump that ships with the package, in about two minutes"),
    "clean": ("cleaning.__main__", "turn raw dumps into conversations, every input accounted for"),
    "inspect": (
        "fastft.data.template.mask_check",
        "show which tokens are trained, or prove the mask over a whole file",
    ),
    "estimate": ("fastft.cost.estimate", "what a run would cost: memory, time and energy on kinds and numbers of GPUs"),
    "train": ("fastft.train", "fine-tune a chat model (several processes: torchrun -m fastft.train)"),
    "answer": (
        "fastft.judge.answer",
        "have a model answer questions: a directory or any OpenAI-compatible endpoint",
    ),
    "judge": ("fastft.judge.command", "have a stronger model compare answers, and say how sure the result is"),
    "bench": ("fastft.judge.exams.bench", "multiple-choice exams (BBH, AGIEval) beside Orca's published figures"),
    "report": ("fastft.train.report.page", "write the page of a run, or of a judged directory"),
    "export": ("fastft.train.export", "write a checkpoint as a Hugging Face model with its card"),
    "chat": ("fastft.inference.engine", "talk to a model in the terminal"),
}


def main(argv: list[str] | None = None) -> int:
    """Call a verb's main(argv). Returns the exit code; 2 for a verb that does not exist."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from fastft import __version__

        print(f"fastft {__version__}")
        return 0
    if argv[0] not in VERBS:
        import difflib

        nearest = difflib.get_close_matches(argv[0], VERBS, n=1, cutoff=0.0)[0]
        print(f"error: unknown verb {argv[0]!r}; did you mean {nearest!r}? (fastft --help lists them)", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])
    except KeyboardInterrupt:
        return 130


def command() -> None:
    """The console script."""
    run(main)


def run(main: Callable[[], int]) -> None:
    """Call `main` and end the process with its code; with 1 after an error that nobody expected, whose stack is shown."""
    try:
        code = main()
    except SystemExit:
        raise
    except BaseException:  # noqa: BLE001  Python's own way out would wait for a thread that writes a checkpoint with the dead
        traceback.print_exc()
        code = 1
    leave(code)


def leave(code: int) -> None:
    """End the process without taking the interpreter apart.

    A worker thread of gloo may still be dropping the tensors of the last collective then; it cannot have the
    interpreter's lock any more and aborts the finished process (1 of 25 runs on 2 processes, torch 2.13, Python 3.11).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _usage() -> str:
    lines = [f"  {verb:<8} {what}" for verb, (_, what) in VERBS.items()]
    return "usage: fastft VERB ...\n\nFrom a dump of shared chats to a chat model.\n\n" + "\n".join(lines)
