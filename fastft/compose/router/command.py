"""`fastft router`: send each question to the model that will probably answer it best."""

from fastft.common.command_line import run_module, subcommands

WHAT = "Send each question to the model that will probably answer it best."
TABLE = {
    "outcomes": ("fastft.compose.router.scoring.collect", "score what the candidates answer, or read it from a record"),
    "train": ("fastft.compose.router.training.train", "train a router on outcomes, beside its baselines"),
    "evaluate": ("fastft.compose.router.figures.evaluate", "measure a router on outcomes that it has not seen"),
    "explain": ("fastft.compose.router.explain", "say why a question goes to a model"),
    "simulate": ("fastft.compose.router.replay.simulate", "replay a record or outcomes under another policy"),
}


def main(argv: list[str]) -> int | None:
    return subcommands(argv, "fastft router", WHAT, TABLE)


if __name__ == "__main__":
    run_module(main)
