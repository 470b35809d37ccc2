"""What options a verb has."""

from fastft.common.command_reader import group_of, options_of


def valid_keys(cls: type) -> list[str]:
    """The dotted names of all keys of a dataclass, with those of the groups inside it."""
    return [option.key for option in options_of(cls) if not group_of(option.annotation)]
