"""What the bundle and its preprocessing are, as terms and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from regraft.manifest import Manifest
from regraft.neurons import Neurons
from regraft.preprocessing import Preprocessing
from regraft.report.markup import Content, clean, el
from regraft.report.wording import TIMES, counted, numbers, short


def bundle_facts(manifest: Manifest, neurons: Neurons) -> Iterator[tuple[str, Content]]:
    """What the bundle says of itself: model, tokens, neurons, redirect."""
    tokens = manifest.tokens
    height, width = manifest.image_size
    rows, cols = tokens.grid
    yield "Model", clean(manifest.model.get("source", "unknown"))
    yield (
        "Architecture",
        clean(manifest.model.get("architecture", "unknown"))
        + f", {counted(tokens.depth, 'block')}, "
        f"width {tokens.width}, {counted(tokens.heads, 'head')}",
    )
    yield "Weights", ("sha256 ", el("code", clean(manifest.model.get("weights_sha256", "unknown"))))
    yield "Precision", f"{manifest.precision}, opset {manifest.opset}"
    yield "Input", f"pixel_values (batch, 3, {height}, {width}) float32"
    others = tokens.prefix - tokens.class_token
    prefix = ["CLS"] if tokens.class_token else []
    prefix += [counted(others, "other prefix token")] if others else []
    yield (
        "Tokens",
        ", ".join(
            [*prefix, f"{counted(tokens.patches, 'patch', 'patches')} ({rows} {TIMES} {cols})"]
        )
        + f"; {counted(tokens.test_time_registers, 'test-time register')}",
    )
    per_layer = Counter(n.layer for n in neurons.neurons)
    where = ", ".join(f"{number} in layer {layer}" for layer, number in sorted(per_layer.items()))
    yield "Register neurons", f"{counted(len(neurons.neurons), 'neuron')}: {where}"
    yield (
        "Outlier token",
        f"patch norm above {short(manifest.threshold)} at the output of layer "
        f"{manifest.detection_layer}",
    )
    options = manifest.redirect
    yield (
        "Redirect",
        f"value {options.value}; cls {options.cls}; patches {options.patches}; "
        f"{counted(options.registers, 'register')}; scale {numbers(options.scale)}",
    )
    yield "Variant", _variant(manifest)
    yield (
        "Written by",
        clean(", ".join(f"{k} {v}" for k, v in manifest.versions.items()) or "unknown"),
    )


def _variant(manifest: Manifest) -> str:
    made = manifest.constants
    if made is None:
        return "token: a test-time register runs through the network"
    return (
        "kv: the neurons are zero in the weights; "
        f"{counted(manifest.sites.attention, 'attention')} "
        f"from layer {made.first_layer} on see the register's mean key and value over "
        f"{counted(made.images, 'image')}"
    )


def preprocessing_facts(steps: Preprocessing) -> Iterator[tuple[str, Content]]:
    """From a decoded picture to the model's input."""
    height, width = steps.image_size
    to_height, to_width = steps.resize_size
    how = {
        "shortest-edge": f"shorter edge to {to_height}",
        "cover": f"to cover {to_height} {TIMES} {to_width}",
        "fit": f"to fit within {to_height} {TIMES} {to_width}",
        "exact": f"to {to_height} {TIMES} {to_width}, whatever the aspect",
        "none": "none",
    }[steps.resize]
    yield "Resize", how if steps.resize == "none" else f"{how}, {steps.interpolation}"
    yield (
        "Crop",
        f"centre, {height} {TIMES} {width}; odd margins: {steps.crop_offset}; "
        f"fill {numbers(steps.fill)}",
    )
    yield (
        "Normalise",
        f"grey levels {TIMES} {steps.rescale:.6g}, mean {numbers(steps.mean)}, "
        f"std {numbers(steps.std)}",
    )
