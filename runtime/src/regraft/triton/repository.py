"""The folders and files of a model repository."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from regraft import __version__
from regraft.bundle import WEIGHTS, Bundle, record
from regraft.errors import InputError, UsageError
from regraft.files import whole_folder
from regraft.manifest import NAME as MANIFEST
from regraft.triton import config, preprocess_model
from regraft.triton.config import Serving
from regraft.triton.pbtxt import Message, text

# At the top, where Triton looks for folders alone: what the repository was written from.
MARKER = "regraft.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def write_repository(
    bundle: Bundle,
    serving: Serving,
    out: str | Path,
    *,
    plan: Path | None = None,
    force: bool = False,
) -> list[Path]:
    """Writes a model repository; it appears whole or not at all.

    Args:
        bundle: what it serves.
        serving: how.
        out: the folder that is to appear.
        plan: a TensorRT plan to serve; None serves the bundle's graph.
        force: whether a repository there may be replaced.

    Returns:
        Its files, relative to it.

    Raises:
        InputError: the name is no model's name, the plan is not there, a precision that a CPU
            cannot run, or the place cannot be written.
    """
    _check(bundle, serving, plan)
    with whole_folder(out, MARKER, force) as folder:
        version = _add(folder, config.model(bundle.manifest, serving))
        if plan is not None:
            shutil.copyfile(plan, version / "model.plan")
        else:
            shutil.copyfile(bundle.graph("model"), version / "model.onnx")
            if (bundle.path / WEIGHTS).exists():  # the graph refers to it by this name
                shutil.copyfile(bundle.path / WEIGHTS, version / WEIGHTS)
        version = _add(folder, config.preprocess(bundle.manifest, serving))
        shutil.copyfile(str(preprocess_model.__file__), version / "model.py")
        settings = json.dumps(bundle.manifest.preprocessing.to_json(), indent=1) + "\n"
        (version / "preprocessing.json").write_text(settings, encoding="utf-8")
        version = _add(folder, config.ensemble(bundle.manifest, serving))
        # An ensemble has no file of its own, but Triton wants its version to be there.
        (version / "README").write_text("The version of an ensemble holds nothing.\n")
        origin = {
            "bundle_sha256": record(bundle.path / MANIFEST).sha256,
            "models": [serving.name, serving.preprocess, serving.images],
            "versions": {"regraft": __version__},
        }
        (folder / MARKER).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def _check(bundle: Bundle, serving: Serving, plan: Path | None) -> None:
    if not _NAME.fullmatch(serving.name):
        raise UsageError(
            f"--name is {serving.name!r}; expected letters, digits, '_', '-' and '.', the first "
            "one a letter or digit"
        )
    if plan is not None and not plan.is_file():
        raise InputError(f"{plan}: no such file; expected a TensorRT plan")
    if bundle.manifest.precision == "bf16" and not serving.gpu:
        raise InputError(
            f"{bundle.path}: bf16 does not run on CPUs; give --device gpu, or export with "
            "--precision fp32"
        )


def _add(folder: Path, message: Message) -> Path:
    model = folder / str(message["name"])
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(text(message), encoding="utf-8")
    return model / "1"
