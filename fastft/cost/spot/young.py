"""Young's interval between two saves, which the trainer and the estimate use."""

import math


def young_interval(blocking_s: float, mean_between_preemptions_s: float, upload_s: float = 0.0) -> float:
    """Seconds of work between two saves at which saves and lost work cost least together: sqrt(2 x blocking x mean).

    From Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974. It holds as long as the
    result is much shorter than the mean. The result is never below `upload_s`, because a save that begins during the upload
    of the previous one only delays that upload. It is 0, which means a save at every step, if a save neither blocks nor
    uploads.

    `blocking_s` is how long training stands still at a save; the upload in the background does not count.
    `mean_between_preemptions_s` is the mean of the whole job: a node's mean divided by the number of nodes. Raises
    ValueError for a negative or infinite time, and for a mean of 0.
    """
    times = {"blocking_s": blocking_s, "upload_s": upload_s, "mean_between_preemptions_s": mean_between_preemptions_s}
    for name, seconds in times.items():
        if not 0 <= seconds < math.inf or (name == "mean_between_preemptions_s" and seconds == 0):
            raise ValueError(f"{name}: {seconds} is not a time in seconds")
    return max(math.sqrt(2 * blocking_s * mean_between_preemptions_s), upload_s)
