"""From single judgments to figures with intervals: win rates, ratings, agreement."""
