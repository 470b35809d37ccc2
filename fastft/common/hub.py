"""Tell within seconds whether a model can be found: a directory, or a name on the Hugging Face Hub ("Qwen/Qwen2.5-7B").

huggingface_hub itself tries for at least 23 s, and transformers several times in a row: 27 to 52 s for a directory's name
with a typing error, on a machine without a network.
"""

import functools
import threading
from pathlib import Path

from fastft.errors import UserError, first_line

HUB_LIMIT_S = 5.0
"""Seconds to wait for the Hub, which usually answers within one."""
KNOWN_BY = ("config.json", "tokenizer_config.json")
"""Files of which one is in the local cache, if a model from the Hub was used before."""


@functools.cache
def require_found(model: str) -> None:
    """Raise UserError unless `model` exists here, or is in the cache of the Hub, or the Hub answers within HUB_LIMIT_S.

    Whether the Hub has the model is left to whoever loads it, because its answer explains what is wrong.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(model).exists():
        return
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"{model}: no such directory")
    try:
        cached = any(isinstance(try_to_load_from_cache(model, name), str) for name in KNOWN_BY)
    except ValueError:  # not a valid name on the Hub, which whoever loads it reports
        return
    if cached or constants.HF_HUB_OFFLINE:
        return
    reasons = ["no answer"]
    # In a thread, because the time limit of a request does not include the look-up of the host's name.
    thread = threading.Thread(target=_ask_hub, args=(model, reasons), daemon=True)
    thread.start()
    thread.join(HUB_LIMIT_S)
    if reasons:
        raise UserError(f"{model}: no such directory, and the Hugging Face Hub cannot be reached ({reasons[-1]})")


def _ask_hub(model: str, reasons: list[str]) -> None:
    """Ask the Hub for the config, once. Empty `reasons` if it answers anything at all, else add what went wrong."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(model, KNOWN_BY[0]), timeout=HUB_LIMIT_S)
    except HfHubHTTPError:  # also an answer
        pass
    except Exception as error:  # from an HTTP library that depends on huggingface_hub's version
        reasons.append(first_line(error))
        return
    reasons.clear()
