"""Errors of other libraries on one line."""

from __future__ import annotations


def reason(error: BaseException, longest: int = 240) -> str:
    """An error's message on one line of at most ``longest`` characters, or else its type."""
    text = " ".join(str(error).split())
    if len(text) > longest:
        text = text[: longest - 3].rstrip() + "..."
    return text or type(error).__name__


def kind_and_reason(error: BaseException, longest: int = 240) -> str:
    """The error's type and its message, or the type alone where there is none."""
    kind, text = type(error).__name__, reason(error, longest)
    return kind if text == kind else f"{kind}: {text}"
