"""The clock of other processes, which jumps a year ahead as soon as a file exists. Only theirs: the machine's stays as it is.

environment = clock.that_jumps(directory, when=directory / "jumped")      # for the processes that shall see it
(directory / "jumped").touch()                                            # now; unlink() sets the clock right again
"""

import os
import shutil
import subprocess
from pathlib import Path

YEAR_S = 365 * 86400
# In place of the C library's function, by which Python, PyTorch and the libraries of storage know what time it is.
LIBRARY = f"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {{
    static int (*original)(clockid_t, struct timespec *);
    if (!original) original = dlsym(RTLD_NEXT, "clock_gettime");
    int code = original(clock, now);
    const char *jumped = getenv("CLOCK_JUMPED");
    if (clock == CLOCK_REALTIME && jumped && access(jumped, F_OK) == 0) now->tv_sec += {YEAR_S};
    return code;
}}
"""


def that_jumps(directory: Path, when: Path) -> dict[str, str] | None:
    """The environment of processes whose clock is a year ahead while the file `when` exists; None without a C compiler."""
    if (compiler := shutil.which("cc")) is None:
        return None
    source, library = directory / "clock.c", directory / "clock.so"
    source.write_text(LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "CLOCK_JUMPED": str(when)}
