"""`python -m fastft.demo` is `fastft demo`."""

import sys

from fastft.demo.run import main

sys.exit(main())
