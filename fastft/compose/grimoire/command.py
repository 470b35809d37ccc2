"""`fastft grimoire`: a strong model writes what a weak one needs to know, and an honest test says whether it helped."""

from fastft.common.command_line import run_module, subcommands

WHAT = "Let a strong model write instructions for a weak one, and test honestly whether they help."
TABLE = {
    "check": (
        "fastft.compose.grimoire.check",
        "look at a task, at grimoires or at recorded runs, before anything is paid",
    ),
    "build": ("fastft.compose.grimoire.build", "have grimoires written, try them on validation questions, and choose"),
    "evaluate": ("fastft.compose.grimoire.evaluate", "measure the choice on the test split, once"),
    "apply": ("fastft.compose.grimoire.apply", "answer texts with the choice, or make training data of the answers"),
}


def main(argv: list[str]) -> int | None:
    return subcommands(argv, "fastft grimoire", WHAT, TABLE)


if __name__ == "__main__":
    run_module(main)
