"""HTML and SVG elements that escape everything they hold, unless it is markup already."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from typing import TypeAlias

from PIL import Image

_VOID = frozenset({"img", "meta", "br"})


class Markup(str):
    """A string that is HTML already and is not escaped again."""

    __slots__ = ()


Content: TypeAlias = "str | int | Iterable[Content] | None"
Attribute: TypeAlias = "str | int | float | None"


def el(name: str, /, *content: Content, **attributes: Attribute) -> Markup:
    """One element.

    Args:
        name: of the element.
        content: texts, which are escaped; markup; iterables of both; None counts for nothing.
        attributes: a trailing underscore is dropped (``class_``), others become hyphens
            (``stroke_width``); None leaves the attribute out, floats keep two decimals.

    Raises:
        ValueError: an attribute that the page's content security policy would block.
    """
    written = "".join(_attribute(key, v) for key, v in attributes.items() if v is not None)
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{fragment(*content)}</{name}>")


def fragment(*content: Content) -> Markup:
    """Contents one after another, escaped as :func:`el` does."""
    return Markup("".join(_pieces(content)))


def clean(text: str) -> str:
    """``text`` without what HTML or UTF-8 cannot hold: control characters, lone surrogates.

    File names may have both.
    """
    return "".join(c if c.isprintable() or c == "\u00a0" else "\ufffd" for c in text)


def png_uri(image: Image.Image) -> str:
    """A picture as a PNG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pieces(content: Iterable[Content]) -> Iterable[str]:
    for item in content:
        if isinstance(item, Markup):
            yield item
        elif isinstance(item, str | int):
            yield html.escape(str(item))
        elif item is not None:
            yield from _pieces(item)


def _attribute(key: str, value: str | int | float) -> str:
    name = key.rstrip("_").replace("_", "-")
    if name == "style" or name.startswith("on"):
        raise ValueError(f"the attribute {name} is blocked by the page's own policy; use a class")
    if isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return f' {name}="{html.escape(str(value))}"'
