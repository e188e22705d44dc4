"""``hub:REPO:ENTRY``: models of torch.hub.

REPO is ``OWNER/NAME`` or ``OWNER/NAME:REF`` on GitHub, or a folder with a ``hubconf.py`` that
starts with ``.``, ``/`` or ``~``; ENTRY is one of its functions. **The repository's code is run.**
torch.hub runs what is in its list of trusted repositories and what it has downloaded before. For
others it asks; where nobody can answer, ``--trust-repo`` says yes. It does not ask about folders.

An entry returns an ``nn.Module``, or a pair of it and a dict with timm's data-config names.
torch.hub itself knows no preprocessing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing
from regraft.wording import with_article
from regraft_export.sources.data_config import (
    NAMES,
    PreprocessingOverrides,
    check_patches,
    from_data_config,
)
from regraft_export.sources.hub_positions import fix_image_size
from regraft_export.sources.reasons import kind_and_reason
from regraft_export.sources.weights import load_weights

_FORM = "expected hub:OWNER/NAME:ENTRY, hub:OWNER/NAME:REF:ENTRY or hub:./FOLDER:ENTRY"


def load(
    spec: str,
    weights: Path | None,
    overrides: PreprocessingOverrides,
    preprocessing: Preprocessing | None = None,
    *,
    trust_repo: bool = False,
) -> tuple[nn.Module, Preprocessing]:
    """Runs the entry; with ``weights`` it is told not to download any (``pretrained=False``).

    A complete ``preprocessing`` stands for the model's own and the overrides.

    Args:
        spec: ``REPO:ENTRY``.
        weights: a checkpoint.
        overrides: preprocessing by hand.
        preprocessing: all of it.
        trust_repo: whether a repository that torch.hub does not trust yet may be run.

    Raises:
        ModelError: no such repository, folder or entry; the repository is not trusted; the entry
            fails or returns something else; incomplete preprocessing; weights that do not fit.
    """
    subject = f"hub:{spec}"
    repo, colon, entry = spec.rpartition(":")
    if not colon or not repo or not entry:
        raise ModelError(f"{subject}: {_FORM}")
    result = _run_entry(subject, repo, entry, trust_repo, with_weights=weights is None)
    module, config = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(module, nn.Module) or not isinstance(config, Mapping):
        raise ModelError(
            f"{subject}: {entry}() returned {with_article(type(result).__name__)}; expected an "
            f"nn.Module, or a pair of it and a dict with {', '.join(NAMES)}"
        )
    if preprocessing is None:
        preprocessing = from_data_config(overrides.over(config), subject)
    if weights is not None:
        load_weights(module, weights)
    patch = getattr(module, "patch_size", None)
    if isinstance(patch, int):
        check_patches(subject, preprocessing.image_size, (patch, patch))
    fix_image_size(module, preprocessing.image_size)
    return module, preprocessing


def _run_entry(subject: str, repo: str, entry: str, trust_repo: bool, *, with_weights: bool) -> Any:
    folder = repo.startswith((".", "/", "~"))
    if folder and not (Path(repo).expanduser() / "hubconf.py").is_file():
        raise ModelError(f"{subject}: no such folder with a hubconf.py: {repo}")
    if not folder and repo.count("/") != 1:
        raise ModelError(f"{subject}: {repo!r} is no repository; {_FORM}")
    options: dict[str, Any] = {"source": "local" if folder else "github", "verbose": False}
    if not folder:
        options["trust_repo"] = True if trust_repo else "check"
    where = str(Path(repo).expanduser()) if folder else repo
    try:
        # torch.hub asks and reports on stdout, where answers for machines go.
        with contextlib.redirect_stdout(sys.stderr):
            if with_weights:
                return torch.hub.load(where, entry, **options)  # type: ignore[no-untyped-call]
            return _without_weights(where, entry, options)
    except EOFError as error:
        raise ModelError(
            f"{subject}: {repo} is not among the repositories that torch.hub trusts, and its code "
            "would be run; if you trust it, give --trust-repo"
        ) from error
    # Foreign code, and a download: anything may be raised.
    except Exception as error:
        cures = ["" if folder else "clone the repository and give its folder"]
        cures.append("give --weights FILE" if with_weights else "")
        raise ModelError(
            f"{subject}: {entry}() of {repo} cannot be run ({kind_and_reason(error)}); "
            "check the names and the connection" + "".join(f", or {cure}" for cure in cures if cure)
        ) from error


def _without_weights(where: str, entry: str, options: dict[str, Any]) -> Any:
    try:
        return torch.hub.load(where, entry, pretrained=False, **options)  # type: ignore[no-untyped-call]
    except TypeError as error:
        if "pretrained" not in str(error):
            raise
        return torch.hub.load(where, entry, **options)  # type: ignore[no-untyped-call]
