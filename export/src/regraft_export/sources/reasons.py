"""Errors of other libraries on one line."""

from __future__ import annotations


def reason(error: BaseException, longest: int = 240) -> str:
    """An error's message on one line of at most ``longest`` characters, or else its type."""
    text = " ".join(str(error).split())
    if len(text) > longest:
        text = text[: longest - 3].rstrip() + "..."
    return text or type(error).__name__
