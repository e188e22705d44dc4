"""For all tests: a cache of their own, the command line in this process, and no skips in CI."""

import itertools
import os
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from regraft.cli.main import main

NO_SKIP = os.environ.get("REGRAFT_NO_SKIP") == "1"


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and REGRAFT_NO_SKIP=1 forbids it: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report)
    return report


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where built engines go: a folder of the test's own, not made yet, never the user's."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(_numbers)}"
    monkeypatch.setenv("REGRAFT_CACHE", str(folder))
    return folder


@pytest.fixture
def regraft(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``regraft("export", ...)`` runs the command line: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # how argparse ends
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
