"""`python -m fastft.demo` is `fastft demo`."""

import sys

from fastft.demo import main

sys.exit(main())
