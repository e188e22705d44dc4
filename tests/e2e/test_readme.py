"""README's commands and code, run as they stand, on the small ViT instead of a download."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from benchmarks import cuda_overhead
from tests.support import bundles, environments, pictures
from tests.support.server import serving

from regraft import Extractor
from regraft.cli.main import main
from regraft.cli.table import all_commands
from regraft_export.demo import sample_images_folder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "export/README.md", "benchmarks/README.md")
DOCS = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
SHIPPED = "python:regraft_export.demo:shipped_vit"
CARD = "--engine tensorrt"  # needs a card; tests/runtime/engines has what can be tested without
FOREIGN = "model.onnx"  # an export that is not patched: the bundle has one
SERVES = "regraft serve"  # does not end; tests/runtime/serve has it
# Of docker, curl and tritonserver.
OTHER_OPTIONS = {"--build-arg", "--cap-drop", "--data-binary", "--model-repository"}
OTHER_OPTIONS |= {"--read-only", "--tmpfs", "--target"}
MODEL = "timm:vit_base_patch14_dinov2.lvd142m"


def blocks(language: str) -> list[str]:
    # All of them, opened and closed by turns, lest the end of one is taken for another's beginning.
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def commands() -> list[str]:
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith("regraft ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(sample_images_folder(), folder / "photos")
    return folder


def test_readme_leads_with_the_two_commands() -> None:
    first = blocks("")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_every_command_of_readme_runs_and_its_code_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    run = [line for line in commands() if CARD not in line and not line.startswith(SERVES)]
    names = [line.split()[1] for line in run]
    first = ["find", "export", "report", "extract", "find", "patch", "patch"]
    then = ["build", "extract", "export", "verify", "extract", "triton"]
    assert names == [*first, *then]
    for line in run:
        assert MODEL in line or " bundle " in line or FOREIGN in line
        words = line.replace(MODEL, SHIPPED).replace(FOREIGN, "bundle/baseline.onnx")
        code = main(shlex.split(words, comments=True)[1:])
        assert code == 0, f"{line}: {capsys.readouterr().err}"
    code_block, _ = blocks("python")
    names = {"cat.jpg": "photos/00.png", "dog.jpg": "photos/01.png"}
    for name, picture in names.items():
        code_block = code_block.replace(name, picture)
    scope = {"paths": sorted((folder / "photos").iterdir())[:5]}
    exec(compile(code_block, "README.md", "exec"), scope)
    features, batch = scope["features"], scope["batch"]
    assert features.cls.shape == (2, 128)
    assert features.patches.shape[:1] == (2,)
    assert features.pooled.shape[0] == 2
    assert len(batch) == 5 % 8
    saved = np.load(folder / "features.npz")
    assert np.allclose(saved["cls"][:2], features.cls, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_readmes_client_gets_the_extractors_numbers(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    python = environments.environment("tritonclient-http", ["tritonclient[http]==2.73.0"])
    bundle = bundles.exported(tmp_path_factory)
    images = sorted(pictures.write(tmp_path, 2).iterdir())
    code = blocks("python")[1] + '\nnp.save("tokens.npy", tokens)\n'
    for name, path in zip(("cat.jpg", "dog.jpg"), images, strict=True):
        assert name in code
        code = code.replace(name, str(path))
    with serving(f"vit={bundle}") as server, Extractor.open(bundle) as extractor:
        assert "127.0.0.1:8000" in code
        code = code.replace(":8000", f":{server.port}")
        subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
        cls = extractor.extract(images).cls
    np.testing.assert_allclose(np.load(tmp_path / "tokens.npy")[:, 0], cls, rtol=1e-4, atol=1e-4)


def test_readme_names_every_command_and_no_other() -> None:
    named = set(re.findall(r"^\| `regraft (\w+)", README, re.MULTILINE))
    assert named == {command.name for command in all_commands()}


def test_install_lines_name_folders_and_extras_that_exist() -> None:
    found = re.findall(r'"\./(\w+)\[([\w,-]+)\]"', README)
    assert found
    for name, extras in found:
        text = (ROOT / name / "pyproject.toml").read_text(encoding="utf-8")
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", text, re.MULTILINE), f"{name}[{extra}]"


def test_the_options_readme_names_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    helps = ""
    monkeypatch.setattr("sys.argv", ["cuda_overhead", "--help"])
    with pytest.raises(SystemExit):
        cuda_overhead.main()
    helps += capsys.readouterr().out
    for command in all_commands():
        with pytest.raises(SystemExit):
            main([command.name, "--help"])
        helps += capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    helps += capsys.readouterr().out
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", DOCS))
    assert {option for option in options if option not in helps} == OTHER_OPTIONS


def test_no_page_has_a_placeholder_and_all_name_files_that_exist() -> None:
    assert not re.findall(r"@[A-Z]+@", DOCS)
    named = re.findall(r"`(benchmarks/results/[\w.-]+|\w+/README\.md)`", DOCS)
    assert {"export/README.md", "benchmarks/README.md"} <= set(named)
    for name in named:
        assert (ROOT / name).is_file(), name


def test_the_contents_lead_to_headings() -> None:
    """By GitHub's rule: in small letters, without punctuation, hyphens between words."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.M
    )
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    links = re.findall(r"\]\(#([\w-]+)\)", README)
    assert len(links) > 10
    assert not set(links) - anchors
