"""Checkpoints from a file, and checks on weights wherever they came from."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.wording import with_article
from regraft_export.sources.reasons import kind_and_reason

_NESTED = ("state_dict", "model", "teacher")
_PREFIXES = ("module.",)
_SHOWN = 3


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads a checkpoint: tensors by name.

    A state dict nested under ``state_dict``, ``model`` or ``teacher`` is taken out, and a prefix
    ``module.`` that all names share (DataParallel) is removed.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote of tensors alone.

    Raises:
        ModelError: unreadable, a pickle that needs code, or no state dict.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file; expected safetensors or a torch.save file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    while isinstance(content, Mapping) and (inner := _nested(content)) is not None:
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise ModelError(
            f"{path}: holds {with_article(type(content).__name__)}; expected tensors by name"
        )
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise ModelError(f"{path}: {_some(strange)} are not tensors; expected a state dict")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return dict(content)


def load_weights(
    module: nn.Module, path: Path, convert: Callable[..., dict[str, Tensor]] | None = None
) -> None:
    """Loads a checkpoint into a module; every name and shape must fit.

    Args:
        module: what to load into.
        path: the checkpoint, see :func:`read_state_dict`.
        convert: called with the state dict and the module before the two are compared; returns
            the state dict in the module's own names and shapes.

    Raises:
        ModelError: the file is unreadable, or keys are missing, unexpected or of another shape.
    """
    state, own = read_state_dict(path), module.state_dict()
    if convert is not None and _shapes(state) != _shapes(own):
        # On a foreign state dict the conversion stumbles anywhere; then it is compared as it is,
        # and the comparison says what does not fit.
        with contextlib.suppress(Exception):
            state = convert(dict(state), module)
    check_keys(
        path,
        type(module).__name__,
        missing=[name for name in own if name not in state],
        unexpected=[name for name in state if name not in own],
        misshapen=[
            f"{name} {list(tensor.shape)} instead of {list(own[name].shape)}"
            for name, tensor in state.items()
            if name in own and tensor.shape != own[name].shape
        ],
    )
    module.load_state_dict(state)


def check_keys(
    path: object,
    architecture: str,
    *,
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Sequence[str],
) -> None:
    """Raises ModelError, with counts and the first few names, unless all three are empty."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names]
    if found:
        raise ModelError(
            f"{path}: the weights do not fit {architecture}: {'; '.join(found)}; expected the "
            "state dict of this very model"
        )


def check_finite(module: nn.Module, subject: str) -> None:
    """Raises ModelError naming the first tensor with a NaN or an infinity."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{subject}: the weight {name} has {bad} NaN or infinite values of "
                f"{tensor.numel()}; expected finite weights"
            )


def weights_sha256(module: nn.Module) -> str:
    """Hash of a module's state dict: names, dtypes, shapes and bytes, by sorted name.

    Weights of other sizes or precisions hash differently; the file format they came from, the
    order of registration and the device do not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _nested(content: Mapping[Any, Any]) -> Any:
    return next((content[n] for n in _NESTED if isinstance(content.get(n), Mapping)), None)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: is not a safetensors file ({error})") from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # torch.load meets arbitrary bytes here, and raises whatever its three readers stumble over.
    except Exception as error:
        with path.open("rb") as stream:  # bytes of other formats look like operands, too
            pickled = stream.read(2)[:1] in (b"\x80", b"P")
        code = pickled and re.search(
            r"Unsupported (?:global: GLOBAL|class|operand) (\S+)", str(error)
        )
        if code:
            raise ModelError(
                f"{path}: this pickle needs code to be read ({code[1]}), which regraft does not "
                "run; save the state dict alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise ModelError(
            f"{path}: is not a checkpoint that torch.load reads "
            f"({kind_and_reason(error, longest=100)}); expected safetensors or a torch.save file"
        ) from error


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ..."
