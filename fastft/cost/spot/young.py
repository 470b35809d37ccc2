"""Young's interval between two saves, for the trainer and for the estimate."""

import math


def young_interval(blocking_s: float, mean_between_preemptions_s: float, upload_s: float = 0.0) -> float:
    """Seconds of work between two saves for which saves and lost work together cost least: sqrt(2 x blocking x mean).

    From Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974. It holds as long as the
    result is much shorter than the mean. The result is never below `upload_s`, because a save that begins before the last
    one is safe only delays it. If a save neither blocks nor uploads the result is 0: save at every step.

    blocking_s: how long training stands still at a save, without its upload in the background. mean_between_preemptions_s:
    of the whole job, that is a node's mean divided by the number of nodes. Raises ValueError for a negative or infinite
    time, or a mean of 0.
    """
    times = {"blocking_s": blocking_s, "upload_s": upload_s, "mean_between_preemptions_s": mean_between_preemptions_s}
    for name, seconds in times.items():
        if not 0 <= seconds < math.inf or (name == "mean_between_preemptions_s" and seconds == 0):
            raise ValueError(f"{name}: {seconds} is not a time in seconds")
    return max(math.sqrt(2 * blocking_s * mean_between_preemptions_s), upload_s)
