"""Words that several messages share."""

from __future__ import annotations


def counted(number: int, word: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {word}{'' if number == 1 else 's'}"
