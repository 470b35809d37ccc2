"""The `fastft` command: each verb is the `main` of one module, which is imported only when the verb is called.

fastft --help
fastft VERB --help
"""

import importlib
import sys

VERBS = {
    "demo": (
        "fastft.demo.run",
        "clean a small dump that ships with the package, train on it, and ask the model, in three minutes",
    ),
    "clean": ("cleaning.__main__", "turn raw dumps into conversations, every input accounted for"),
    "inspect": ("fastft.data.inspect", "show which tokens are trained, or prove the loss mask of a whole file"),
    "estimate": (
        "fastft.cost.command",
        "say what a run would take: memory, time, energy and money, on different GPUs",
    ),
    "train": ("fastft.train.loop", "fine-tune a chat model (several processes: torchrun -m fastft.train)"),
    "answer": (
        "fastft.compose.answer",
        "have a model answer questions: a directory, any OpenAI-compatible endpoint, or a blend of them",
    ),
    "judge": ("fastft.judge.command", "have a stronger model compare answers, and say how sure the result is"),
    "bench": ("fastft.judge.exams.bench", "take multiple-choice exams (BBH, AGIEval), beside Orca's published figures"),
    "report": ("fastft.cli", "write the page of a run, or of a judged directory"),
    "export": ("fastft.train.export", "write a checkpoint as a Hugging Face model with its card"),
    "chat": ("fastft.inference.terminal", "talk to a model in the terminal"),
    "serve": ("fastft.serve.command", "serve models behind one address that speaks OpenAI's API"),
    "router": ("fastft.compose.router.command", "send each question to the model that will answer it best"),
    "abtest": ("fastft.compose.abtest.command", "say whether users come back more often, and use more, under one arm"),
    "grimoire": (
        "fastft.compose.grimoire.command",
        "let a strong model write instructions for a weak one, and test whether they help",
    ),
    "distill": ("fastft.distill.command", "make training data by asking teachers, from queries to a ready train.yaml"),
    "record": ("fastft.serve.record", "export what was served: events, or conversations to clean and train on"),
}


def main(argv: list[str] | None = None) -> int:
    """Call a verb and return its exit code: 1 after an error, 2 if the command itself is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from fastft import __version__

        print(f"fastft {__version__}")
        return 0
    from fastft.common import logs
    from fastft.common.command_line import run

    logs.show()
    return run(lambda: _call(argv[0], argv[1:]))


def command() -> None:
    """The console script: run the command of this process, and end the process."""
    from fastft.common.command_line import leave

    try:
        code = main()
    except SystemExit as end:  # argparse's, after --help and --print_config
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    leave(code)


def _call(verb: str, argv: list[str]) -> int | None:
    """Call the `main` of a verb with the words that follow it. Raises UsageError for a verb that does not exist."""
    if verb not in VERBS:
        import difflib

        from fastft.errors import UsageError

        nearest = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown verb {verb!r}; did you mean {nearest!r}? (fastft --help lists all)")
    if verb == "report":
        return _report(argv)
    return importlib.import_module(VERBS[verb][0]).main(argv)


def _report(argv: list[str]) -> int:
    """Write the page of a directory, the judge's, a distillation's or the trainer's: `fastft report DIR`."""
    from dataclasses import dataclass
    from pathlib import Path

    from fastft.common.command_line import option, parse
    from fastft.errors import UserError

    @dataclass
    class ReportConfig:
        directory: str = option(positional=True)
        """A run's directory (--output_dir of fastft train), or what fastft judge or distill wrote (-o)."""

    [config] = parse(argv, "fastft report", "Write the page of a run, DIR/report.html.", ReportConfig)
    directory = Path(config.directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if (directory / "judgments.jsonl").is_file():
        from fastft.judge.report import report_again

        print(report_again(directory))
    elif (directory / "ledger.json").is_file():
        from fastft.distill.report import write_report_again

        print(write_report_again(directory))
    else:
        from fastft.train.report.page import write_run_report

        print(write_run_report(directory))
    return 0


def _usage() -> str:
    lines = [f"  {verb:<8} {what}" for verb, (_, what) in VERBS.items()]
    return "usage: fastft VERB ...\n\nFrom a dump of shared chats to a chat model.\n\n" + "\n".join(lines)
