"""`fastft abtest`: say whether users come back more often, and use more, under one arm than under another."""

from fastft.common.command_line import run_module, subcommands

WHAT = "Say whether users come back more often, and use more, under one arm than under another."
TABLE = {
    "figures": ("fastft.compose.abtest.figures", "compare the arms of an experiment with its control"),
    "power": ("fastft.compose.abtest.power", "say, before the start, which effects an experiment of a size would find"),
    "simulate": (
        "fastft.compose.abtest.simulate",
        "try an experiment of a size on real activity, with an effect or without",
    ),
}


def main(argv: list[str]) -> int | None:
    return subcommands(argv, "fastft abtest", WHAT, TABLE)


if __name__ == "__main__":
    run_module(main)
