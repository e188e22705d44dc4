from __future__ import annotations

import io

import pytest

from regraft.progress import BuildBar, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_drawn_where_nobody_watches() -> None:
    stream = io.StringIO()
    with Progress(3, "images", stream=stream) as progress:
        progress.advance()
        progress.note("cat.jpg: torn")
    assert stream.getvalue() == "cat.jpg: torn\n"


def test_the_bar_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = Terminal()
    with Progress(4, "images", "scoring", stream) as progress:
        progress.advance()
        progress.note("cat.jpg: torn")
        progress.advance(3)
    drawn = [line.rpartition("\r\x1b[K")[2] for line in stream.getvalue().strip().split("\n")]
    assert "scoring [######..................] 1/4 images" in stream.getvalue()
    assert "left" in stream.getvalue()
    assert drawn[0] == "cat.jpg: torn"
    assert drawn[-1].startswith(f"scoring [{'#' * 24}] 4/4 images")
    assert "left" not in drawn[-1]


def test_without_a_total_it_counts() -> None:
    stream = Terminal()
    with Progress(None, "images", stream=stream) as progress:
        progress.advance(5)
    assert "5 images" in stream.getvalue()
    assert "[" not in stream.getvalue().replace("\x1b[K", "")


def test_hours_are_written_out() -> None:
    from regraft.progress import _clock

    assert [_clock(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_a_build_has_one_bar_for_each_phase() -> None:
    stream = Terminal()
    with BuildBar(stream) as bar:
        for done in (0, 1, 2):
            bar("parsing", done, 2)
        bar("timing", 0, None)
        bar("timing", 3, None)
    lines = [line.rpartition("\r\x1b[K")[2] for line in stream.getvalue().strip().split("\n")]
    assert len(lines) == 2
    assert lines[0].startswith(f"parsing [{'#' * 24}] 2/2 steps")
    assert lines[1].startswith("timing 3 steps")


def test_a_build_that_nobody_watches_is_silent() -> None:
    stream = io.StringIO()
    with BuildBar(stream) as bar:
        bar("parsing", 1, 2)
    assert stream.getvalue() == ""
