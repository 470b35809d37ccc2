"""TODO docstring of fastft.common.files."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def short_name(place: str) -> str:
    """A file or directory by its last name; a name on the Hub as it is."""
    path = Path(place)
    local = path.exists() or path.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1
    return path.resolve().name if local else place
