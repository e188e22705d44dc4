"""Signals that come in the middle of an import."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from regraft.cli import signals
from regraft.cli.signals import Signals, unwinding


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """``module(body)``: ``import slow_module`` runs this."""

    def write(body: str) -> None:
        (tmp_path / "slow_module.py").write_text(f"import signal, time\n{body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "slow_module", raising=False)

    return write


def load() -> None:
    import slow_module  # type: ignore[import-not-found]  # noqa: F401


def load_and_wait() -> None:
    load()
    time.sleep(20)


@pytest.mark.parametrize(
    ("name", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)]
)
def test_a_signal_waits_until_the_import_is_done(
    module: Callable[[str], None], name: str, error: type[BaseException]
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number), signal.getsignal(signal.SIGALRM)
    module(f"signal.raise_signal(signal.{name}); time.sleep(0.2)")
    # It may come as soon as the import is done, so all of it is where it is expected.
    with unwinding() as seen, pytest.raises(error) as caught:
        load_and_wait()
    assert "slow_module" in sys.modules  # an import that is interrupted leaves nothing there
    assert seen.interrupt == (name == "SIGINT")
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 128 + number
    assert (signal.getsignal(number), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_callers_alarm_is_left_alone() -> None:
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: rang.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        with unwinding():
            signal.raise_signal(signal.SIGALRM)
        assert rang == [signal.SIGALRM]
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_outside_of_imports_it_comes_at_once() -> None:
    with unwinding(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_import_that_does_not_end_is_interrupted(
    module: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_LONGEST", 0.2)
    module("signal.raise_signal(signal.SIGINT); time.sleep(20)")
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), unwinding():
        load()
    assert 0.2 <= time.monotonic() - start < 10
    assert "slow_module" not in sys.modules


def test_what_the_last_import_put_off_is_not_lost(
    module: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_AGAIN", 60.0)  # the alarm is not what brings it here
    module("signal.raise_signal(signal.SIGINT)")
    with unwinding() as seen:
        load()
        with pytest.raises(KeyboardInterrupt):
            seen.settle()
        seen.settle()  # once
    Signals().settle()


def test_native_code_that_calls_python_within_an_import_sees_no_exception(tmp_path: Path) -> None:
    """As compiled modules do, it calls Python where an exception would end the process."""
    (tmp_path / "native.py").write_text(
        "import ctypes, os, signal, sys, time\n"
        "sys.unraisablehook = lambda _: os.abort()\n"
        "def call():\n    signal.raise_signal(signal.SIGINT); time.sleep(0.2)\n"
        "ctypes.CFUNCTYPE(None)(call)()\n"
    )
    code = (
        "import time\nfrom regraft.cli.signals import unwinding\n"
        "with unwinding():\n    import native\n    time.sleep(20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == -signal.SIGINT, done.stderr  # as Python ends by KeyboardInterrupt
    assert "KeyboardInterrupt" in done.stderr
