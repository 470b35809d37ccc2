"""What loading a tokenizer imports, for worker processes to share: transformers without torch.

transformers imports torch where there is one, which takes 1.3 s of its 2.3 s and 180 MB, and no tokenizer needs it.
Where there is none it works all the same; so it is told here that there is none. Only for the fork server of the workers,
and only where no code of the user's runs there: what such a process imports of transformers later knows of no models.
"""

import os
import sys

if "torch" not in sys.modules:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    sys.modules["torch"] = None  # Python's way to say that a module cannot be imported
try:
    import transformers.models.auto.tokenization_auto  # noqa: F401

    import fastft.template  # noqa: F401
finally:
    if sys.modules["torch"] is None:
        del sys.modules["torch"]
