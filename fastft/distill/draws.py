"""Draws that are functions of (seed, purpose, id): the same on every machine, and the same if other queries come or go."""

import hashlib


def draw(seed: int, purpose: str, id: str) -> int:
    """A whole number from 0 to 2^64 - 1, uniform over ids."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{purpose}\0{id}".encode(), digest_size=8).digest(), "big")


def share(seed: int, purpose: str, id: str) -> float:
    """A number from 0 up to, and without, 1, uniform over ids."""
    return (draw(seed, purpose, id) >> 11) / (1 << 53)
