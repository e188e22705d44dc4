"""Words that several messages share."""

from __future__ import annotations

from collections.abc import Sequence

_NAMED = 3


def counted(number: int, word: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def none_read(images: int) -> str:
    """Says that not one of so many images could be read, where each was named before."""
    if images == 1:
        return "the only image could not be read (named above)"
    return f"none of the {images} images could be read (named above)"


def some_unread(failed: int, images: int) -> str:
    """Says how many images could not be read, where each was named before."""
    return f"{failed} of {counted(images, 'image')} could not be read (named above)"


def unread(messages: Sequence[str], images: int) -> str:
    """Says how many images could not be read, and names the first few.

    Args:
        messages: one of each, which names it; at least one.
        images: how many there were in all.
    """
    if len(messages) == 1:
        return messages[0]
    more = len(messages) - _NAMED
    named = "; ".join([*messages[:_NAMED], *([f"and {more} more"] if more > 0 else [])])
    return f"{len(messages)} of {images} images could not be read: {named}"


def with_article(noun: str) -> str:
    """``a dict``, ``an int``."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
