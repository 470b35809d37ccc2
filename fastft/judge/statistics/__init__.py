"""Statistics over judgments: win rates, ratings and agreement, with intervals."""
