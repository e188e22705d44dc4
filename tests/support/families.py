"""Families of models: how one is built, saved and planted; small and real ones lie beside this.

Every model is its library's real class, randomly initialised; :func:`planting.plant` makes units of
it write outlier tokens. A family is saved as a user would have it: a folder, or code and a
checkpoint, so that the command line loads it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import save_file
from tests.support.models import livened
from tests.support.planting import flagged_pictures, plant
from torch import nn

from regraft.neurons import Neurons, RegisterNeuron

HUB = Path(__file__).parent / "hub_dinov2"
Save = Callable[[nn.Module, Path], tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """One model.

    Attributes:
        build: makes the module, with the library's own initial weights.
        save: writes it planted into a folder; returns MODEL and what else its command line needs.
        size: the image's edge.
        patch: the patch's edge.
        prefix: prefix tokens.
        layers: blocks that get planted units; the last one is the detection layer or before it.
        visual: which part of the module is the image tower.
        rotary: whether positions are given inside attention.
        norm: of the planted outlier tokens, in medians; less where the output is a mean of all.
        reduced: what is smaller than in the published model, for the test's name.
        library: what must be installed beside torch, timm and transformers.
    """

    build: Callable[[], nn.Module]
    save: Save
    size: int
    patch: int
    prefix: int
    layers: tuple[int, ...] = (1,)
    visual: Callable[[nn.Module], nn.Module] = field(default=lambda module: module)
    rotary: bool = False
    norm: float = 8.0
    reduced: str = ""
    library: str = "torch"


def _as_python(code: str) -> Save:
    """As ``python:FILE.py:vit`` with ``--weights``."""

    def save(module: nn.Module, folder: Path) -> tuple[str, ...]:
        (folder / "own.py").write_text(code)
        torch.save(module.state_dict(), folder / "own.pth")
        return f"python:{folder / 'own.py'}:vit", "--weights", str(folder / "own.pth")

    return save


def of_timm(name: str, size: int, patch: int, prefix: int, **options: Any) -> Family:
    """A timm model; options other than Family's go to ``create_model``."""
    about = _of_family(options)
    settings = {"num_classes": 0, "img_size": size, **options}
    code = (
        "import timm\n\n\ndef vit():\n"
        f"    return timm.create_model({name!r}, **{settings!r}), {{}}\n"
    )
    return Family(
        lambda: timm.create_model(name, **settings),
        _as_python(code),
        size, patch, prefix, **about,
    )  # fmt: skip


def _as_folder(module: nn.Module, folder: Path) -> tuple[str, ...]:
    module.save_pretrained(folder)
    return (f"hf:{folder}",)


def _as_mae(module: nn.Module, folder: Path) -> tuple[str, ...]:
    """A ViT's weights in a checkpoint of transformers' MAE, whose own class shuffles patches."""
    shared = tf.ViTMAEConfig().to_dict().keys() - {"model_type", "architectures"}
    own = {k: v for k, v in module.config.to_dict().items() if k in shared}
    mae = tf.ViTMAEModel(tf.ViTMAEConfig(**own))
    mae.load_state_dict(module.state_dict())
    return _as_folder(mae, folder)


def of_transformers(model: Any, config: Any, prefix: int, **options: Any) -> Family:
    """A transformers model; options other than Family's go to its configuration."""
    about = _of_family(options)
    settings = {"image_size": 64, "patch_size": 8, **options}
    return Family(
        lambda: model(config(**settings)),
        _as_folder,
        settings["image_size"], settings["patch_size"], prefix, **about,
    )  # fmt: skip


def of_transformers_mae(**options: Any) -> Family:
    """Loaded as plain ViT, without the pooler that a checkpoint of MAE lacks."""

    def build(config: Any) -> nn.Module:
        module: nn.Module = tf.ViTModel(config, add_pooling_layer=False)
        return module

    return replace(of_transformers(build, tf.ViTConfig, 1, **options), save=_as_mae)


def of_open_clip(
    config: Callable[[], dict[str, Any]], size: int, patch: int, prefix: int = 1, **about: Any
) -> Family:
    """An OpenCLIP model of a configuration, as ``open_clip:local-dir:FOLDER``.

    open_clip is imported when a model is made: machines with a card may be without it.
    """

    def build() -> nn.Module:
        module: nn.Module = importlib.import_module("open_clip").CLIP(**config())
        return module

    def save(module: nn.Module, folder: Path) -> tuple[str, ...]:
        preprocess = {"mean": [0.5] * 3, "std": [0.2] * 3, "resize_mode": "squash"}
        about = {"model_cfg": config(), "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(about))
        save_file(module.state_dict(), folder / "open_clip_model.safetensors")
        return (f"open_clip:local-dir:{folder}",)

    return Family(
        build,
        save,
        size, patch, prefix,
        visual=lambda module: module.visual,
        library="open_clip",
        **about,
    )  # fmt: skip


def of_hub(entry: str, size: int, prefix: int, **about: Any) -> Family:
    """A model of the hub folder, through its entry."""

    def build() -> nn.Module:
        plain = {"pretrained": False} if entry != "tiny" else {}
        module: nn.Module = torch.hub.load(str(HUB), entry, source="local", **plain)
        return module

    def save(module: nn.Module, folder: Path) -> tuple[str, ...]:
        torch.save(module.state_dict(), folder / "hub.pth")
        return f"hub:{HUB}:{entry}", "--weights", str(folder / "hub.pth")

    return Family(build, save, size, 14, prefix, **about)


def _of_family(options: dict[str, Any]) -> dict[str, Any]:
    """Takes out what :class:`Family` itself is told."""
    return {k: options.pop(k) for k in ("layers", "rotary", "norm", "reduced") if k in options}


def cases(families: Mapping[str, Family]) -> list[Any]:
    """Their names for ``parametrize``; those whose library is not installed are skipped."""
    return [
        pytest.param(
            name,
            id=f"{name} ({family.reduced})" if family.reduced else name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(family.library) is None,
                reason=f"{family.library} is not installed",
            ),
        )
        for name, family in families.items()
    ]


def planted_module(family: Family) -> nn.Module:
    """The family's module, livened, with planted units and dead ones."""
    module = family.build().eval().requires_grad_(False)
    tower = livened(family.visual(module))
    pixels = flagged_pictures(8, 1, family.size, family.patch)
    planted = plant(tower, pixels, units_of(family), norm=family.norm)
    for layer, index in DEAD:
        if layer < len(planted.vit.blocks):
            planted.vit.blocks[layer].down.weight[:, index] = 0
    return module


def units_of(family: Family) -> tuple[tuple[int, int], ...]:
    """(layer, index) of the planted units: two in each of the family's layers."""
    return tuple((layer, index) for layer in family.layers for index in (5, 60))


# Units that write nothing: redirecting them moves nothing.
DEAD = ((0, 7), (2, 7))


def dead_neurons() -> Neurons:
    """:data:`DEAD` as register neurons."""
    return Neurons(tuple(RegisterNeuron(*unit, score=1.0, sign=1, value=0.0) for unit in DEAD))
