from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from regraft import __version__
from regraft.cli import main as main_module
from regraft.cli import table
from regraft.errors import InputError

Regraft = Callable[..., tuple[int, str, str]]


def in_a_process(*words: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "regraft", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def export_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "entry_points", lambda group: ())


def add_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, body: str, module: str = "words_cmd"
) -> None:
    """Makes a command of another distribution, whose ``run`` has this body."""
    (tmp_path / f"{module}.py").write_text(
        '"""Says its words."""\n'
        "def add_arguments(parser):\n    parser.add_argument('words', nargs='*')\n"
        f"def run(args):\n    {body}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    entry = EntryPoint(name, module, "regraft.commands")
    monkeypatch.setattr(table, "entry_points", lambda group: (entry,))


def test_help_lists_every_command(regraft: Regraft) -> None:
    code, out, err = regraft("--help")
    assert (code, err) == (0, "")
    listed = [line.split()[0] for line in out.partition("commands:\n")[2].splitlines()]
    expected = ["demo", "find", "export", "patch", "verify", "build", "extract", "bench", "report"]
    assert listed[:10] == [*expected, "inspect"]


def test_help_lists_export_commands_without_their_distribution(
    regraft: Regraft, export_missing: None
) -> None:
    _, out, _ = regraft("--help")
    assert "find      finds a model's register neurons (needs regraft-export)" in out


def test_version(regraft: Regraft) -> None:
    assert regraft("--version") == (0, f"regraft {__version__}\n", "")


def test_wrong_usage_exits_2(regraft: Regraft, pristine_bundle: Path) -> None:
    code, out, err = regraft()
    assert (code, out) == (2, "")
    assert err.startswith("usage: regraft")
    for words, message in [
        (["fnd"], "there is no command 'fnd'; expected one of demo, find, export, patch, verify,"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--fast", "inspect", "x"], "unrecognized arguments: --fast"),
        (["inspect"], "the following arguments are required: BUNDLE"),
        (["inspect", pristine_bundle, "--fast"], "unrecognized arguments: --fast"),
        (["bench", pristine_bundle, "--batch-sizes", "1,0"], "'0' is not an integer from 1"),
        (["bench", pristine_bundle, "--batch-sizes", ","], "it is empty; expected words"),
        (["bench", pristine_bundle, "--rounds", "few"], "'few' is not an integer from 2"),
        (["bench", pristine_bundle, "--engine", "gpu"], "invalid choice: 'gpu'"),
        (
            ["bench", pristine_bundle, "--threads", "100000"],
            "'100000' is not an integer from 1 to 1024",
        ),
    ]:
        code, out, err = regraft(*words)
        assert (code, out) == (2, ""), words
        assert message in err, words


def test_an_export_command_says_what_to_install(regraft: Regraft, export_missing: None) -> None:
    code, out, err = regraft("find", "timm:vit_tiny", "--images", "photos")
    assert (code, out) == (1, "")
    assert err == (
        "regraft: `regraft find` needs the export distribution, which is not installed; "
        "pip install 'regraft-export', or in a checkout of regraft pip install './export'\n"
    )


def test_a_command_of_another_distribution_runs(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_command(monkeypatch, tmp_path, "say", "print(args.words); return 7")
    assert regraft("say", "a", "b") == (7, "['a', 'b']\n", "")
    code, out, _ = regraft("say", "--help")
    assert code == 0
    assert "Says its words." in out
    assert out.startswith("usage: regraft say")
    assert "say       from elsewhere" in regraft("--help")[1]


def test_a_distribution_cannot_replace_a_runtime_command(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_command(monkeypatch, tmp_path, "inspect", "return 7")
    code, _, err = regraft("inspect", tmp_path / "none")
    assert code == 1
    assert "none: no such folder" in err


def test_help_imports_no_command(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_command(monkeypatch, tmp_path, "find", "return 0")
    regraft("--help")
    assert "words_cmd" not in sys.modules


def test_an_error_is_one_line_and_exit_1(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = "from regraft.errors import InputError; raise InputError('cat.jpg: torn\\n  in two')"
    add_command(monkeypatch, tmp_path, "tear", body)
    assert regraft("tear") == (1, "", "regraft: cat.jpg: torn in two\n")
    for words in (("tear", "--traceback"), ("--traceback", "tear")):
        code, out, err = regraft(*words)
        assert (code, out) == (1, "")
        assert err.startswith("Traceback (most recent call last):")
        assert "regraft.errors.InputError: cat.jpg: torn" in err


def test_options_that_do_not_go_together_exit_2(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = "from regraft.errors import UsageError; raise UsageError('--a is for --b')"
    add_command(monkeypatch, tmp_path, "mix", body)
    assert regraft("mix") == (2, "", "regraft: --a is for --b\n")
    code, _, err = regraft("mix", "--traceback")
    assert (code, err.startswith("Traceback (most recent call last):")) == (2, True)


def test_a_bug_keeps_its_traceback(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_command(monkeypatch, tmp_path, "break", "return 1 // 0")
    with pytest.raises(ZeroDivisionError):
        regraft("break")


def test_an_interrupt_exits_130(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_command(monkeypatch, tmp_path, "wait", "raise KeyboardInterrupt")
    assert regraft("wait") == (130, "", "regraft: interrupted\n")


def test_warnings_are_one_line(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = "import logging; logging.getLogger('regraft').warning('slow'); return 0"
    add_command(monkeypatch, tmp_path, "warn", body)
    assert regraft("warn") == (0, "", "regraft: warning: slow\n")


def test_a_command_within_a_command_warns_once(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = """
    import logging
    from regraft.cli.main import main
    if not args.words:
        return main(["warn", "inner"])
    logging.getLogger("regraft").warning("slow")
    return 0
"""
    add_command(monkeypatch, tmp_path, "warn", body)
    assert regraft("warn") == (0, "", "regraft: warning: slow\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_sigterm_unwinds(
    regraft: Regraft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    body = f"""
    import os, signal, time
    from regraft.files import whole_file
    with whole_file({str(tmp_path / "out.bin")!r}) as hidden:
        hidden.write_text('half')
        os.kill(os.getpid(), signal.{name})
        time.sleep(20)
"""
    add_command(monkeypatch, tmp_path, "linger", body)
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored
    assert regraft("linger")[0] == 128 + number
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert signal.signal(number, before) is signal.SIG_DFL


def test_a_reader_that_goes_away_is_no_traceback(pristine_bundle: Path) -> None:
    command = [sys.executable, "-m", "regraft", "inspect", pristine_bundle, "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_command_is_installed(pristine_bundle: Path) -> None:
    done = in_a_process("inspect", pristine_bundle, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["manifest"]["schema"] == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from regraft.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'PIL', 'torch', 'onnx', 'onnxruntime', 'regraft_export'}\n"
        "sys.exit(repr(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"


def test_the_table_names_modules_that_exist() -> None:
    own = [command for command in table.all_commands() if command.name in ("extract", "bench")]
    assert [command.module for command in own] == [
        "regraft.commands.extract",
        "regraft.commands.bench",
    ]
    assert table.find_command("none") is None
    with pytest.raises(InputError, match="`regraft find` needs the export distribution"):
        table.module_of(table.Command("find", "", None))
    assert main_module.INTERRUPTED == 130
