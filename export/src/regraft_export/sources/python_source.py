"""``python:FILE.py:FUNCTION`` and ``python:package.module:FUNCTION``: models from own code.

The function takes no arguments and returns an ``nn.Module``, or a pair of it and a dict with
timm's data-config names. What neither the dict nor the options say is taken from the module's
``pretrained_cfg``, which the models of ``timm.create_model`` carry. The code is run: use files you
trust.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from regraft.errors import ModelError
from regraft.preprocessing import Preprocessing
from regraft.wording import with_article
from regraft_export.sources.data_config import NAMES, PreprocessingOverrides, from_data_config
from regraft_export.sources.reasons import kind_and_reason
from regraft_export.sources.weights import load_weights

_CURE = "return (module, {...}) with " + ", ".join(NAMES)


def load(
    spec: str,
    weights: Path | None,
    overrides: PreprocessingOverrides,
    preprocessing: Preprocessing | None = None,
) -> tuple[nn.Module, Preprocessing]:
    """Imports the file or module and calls the function.

    A complete ``preprocessing`` stands for the model's own and the overrides.

    Raises:
        ModelError: no such file, module or function; it fails or returns something else; the
            preprocessing is incomplete; the weights do not fit.
    """
    subject = f"python:{spec}"
    target, colon, function = spec.rpartition(":")
    if not colon or not target or not function:
        raise ModelError(
            f"{subject}: expected python:FILE.py:FUNCTION or python:package.module:FUNCTION"
        )
    folder = Path(target).resolve().parent if target.endswith(".py") else Path.cwd()
    with _on_path(folder):
        result = _call(subject, _import(subject, target), function)
    module, config = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(module, nn.Module) or not isinstance(config, Mapping):
        raise ModelError(
            f"{subject}: returned {_kind(result)}; expected an nn.Module, or a pair of it and a "
            f"dict with {', '.join(NAMES)}"
        )
    if preprocessing is None:
        config = overrides.over(_completed(config, module, overrides))
        preprocessing = from_data_config(config, subject, _CURE)
    if weights is not None:
        load_weights(module, weights)
    return module, preprocessing


def _completed(
    config: Mapping[str, Any], module: nn.Module, overrides: PreprocessingOverrides
) -> Mapping[str, Any]:
    """The function's dict, and what it leaves out by timm's record on the module, if any."""
    said = overrides.over(config)
    missing = [name for name in NAMES if said.get(name) is None]
    recorded = getattr(module, "pretrained_cfg", None)
    if not missing or not isinstance(recorded, Mapping) or not recorded:
        return config
    try:
        import timm.data
    except ModuleNotFoundError:  # a record in another package's name
        return config
    resolved = timm.data.resolve_model_data_config(module)
    # timm records the published size, whatever img_size the model was built with.
    built = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(built, tuple):
        resolved["input_size"] = (3, *built)
    return {**config, **{name: resolved[name] for name in missing if name in resolved}}


def _import(subject: str, target: str) -> ModuleType:
    path = Path(target)
    if target.endswith(".py") and not path.is_file():
        raise ModelError(f"{subject}: no such file {target}")
    try:
        if not target.endswith(".py"):
            return importlib.import_module(target)
        name = f"regraft_python_source_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # the suffix .py always has a loader
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickling look a class's module up by name.
        sys.modules[name] = module
        spec.loader.exec_module(module)
    # The user's own code may raise anything; --traceback shows where.
    except Exception as error:
        raise ModelError(
            f"{subject}: importing {target} failed ({kind_and_reason(error)})"
        ) from error
    return module


def _call(subject: str, module: ModuleType, function: str) -> Any:
    build = getattr(module, function, None)
    if not callable(build):
        origin = Path(module.__file__ or module.__name__).name
        raise ModelError(
            f"{subject}: {origin} has no function {function!r}; expected one without "
            "arguments that returns an nn.Module"
        )
    try:
        return build()
    # As above: the user's own code.
    except Exception as error:
        raise ModelError(f"{subject}: {function}() failed ({kind_and_reason(error)})") from error


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Lets the code import its neighbours, as ``python FILE.py`` does."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the code itself may have changed sys.path
            sys.path.remove(str(folder))


def _kind(result: object) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in result) or 'nothing'}"
    return with_article(type(result).__name__)
