"""`python -m fastft.demo` is `fastft demo`."""

import sys

from fastft.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
