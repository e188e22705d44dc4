"""The report's page as parsed HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest


@dataclass
class Node:
    """An element of the page: its name, attributes, children and text pieces."""

    name: str
    attributes: dict[str, str]
    content: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text below, in order."""
        return "".join(c if isinstance(c, str) else c.text for c in self.content)

    def all(self, name: str = "", **attributes: str) -> list[Node]:
        """Every element below of this name whose attributes have these words."""
        found = []
        for child in self.content:
            if isinstance(child, Node):
                words = {k: child.attributes.get(k.rstrip("_"), "").split() for k in attributes}
                if name in ("", child.name) and all(v in words[k] for k, v in attributes.items()):
                    found.append(child)
                found += child.all(name, **attributes)
        return found

    def one(self, name: str = "", **attributes: str) -> Node:
        """The only such element."""
        (found,) = self.all(name, **attributes)
        return found

    def rows(self) -> list[list[str]]:
        """Cells of the tables below."""
        cells = ("td", "th")
        return [
            [c.text for c in tr.content if isinstance(c, Node) and c.name in cells]
            for tr in self.all("tr")
        ]

    def facts(self) -> dict[str, str]:
        """Terms and values of the definition lists below."""
        names, values = self.all("dt"), self.all("dd")
        return {n.text: v.text for n, v in zip(names, values, strict=True)}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {k: v or "" for k, v in attrs})
        self.open[-1].content.append(node)
        if tag not in ("img", "meta", "br"):
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


@pytest.fixture(scope="session")
def parse() -> Callable[[str], Node]:
    """HTML to a tree; every tag must be closed where it belongs."""

    def read(text: str) -> Node:
        reader = _Reader()
        reader.feed(text)
        reader.close()
        assert len(reader.open) == 1
        return reader.open[0]

    return read


@pytest.fixture(scope="session")
def make_page(
    tmp_path_factory: pytest.TempPathFactory, parse: Callable[[str], Node]
) -> Callable[..., Node]:
    """``make_page(bundle, images, *words)`` runs `regraft report` and parses what it wrote."""
    from regraft.cli.main import main

    def run(bundle: Path, images: Path, *words: str) -> Node:
        out = tmp_path_factory.mktemp("pages") / "report.html"
        assert (
            main(["report", str(bundle), "--images", str(images), "--out", str(out), *words]) == 0
        )
        return parse(out.read_text(encoding="utf-8"))

    return run
