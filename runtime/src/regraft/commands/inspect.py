"""Says what is in a bundle, in words: model, neurons, redirect, outputs, files."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from regraft.bundle import VERIFY, Bundle
from regraft.manifest import Manifest
from regraft.neurons import Neurons


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `regraft export` wrote")
    parser.add_argument(
        "--json", action="store_true", help="the manifest and the register neurons, for machines"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the bundle's description."""
    bundle = Bundle.open(args.bundle)
    neurons = bundle.neurons()
    if args.json:
        rows = neurons.to_json()["neurons"]
        print(json.dumps({"manifest": bundle.manifest.to_json(), "neurons": rows}, indent=2))
        return 0
    for title, line in _lines(bundle, neurons):
        print(f"{title:<15}{line}")
    return 0


def _lines(bundle: Bundle, neurons: Neurons) -> Iterator[tuple[str, str]]:
    manifest = bundle.manifest
    yield "bundle", f"{bundle.path}, every file as it was written"
    yield from _model(manifest)
    yield from _redirect(manifest, neurons)
    for name, shape in manifest.outputs.items():
        yield "output", f"{name} ({', '.join(map(str, shape))})"
    yield from _files(bundle)


def _model(manifest: Manifest) -> Iterator[tuple[str, str]]:
    model, tokens = manifest.model, manifest.tokens
    rows, cols = tokens.grid
    height, width = manifest.image_size
    yield "model", f"{model.get('source', 'unknown')} ({model.get('architecture', 'unknown')})"
    yield (
        "",
        f"{_count(tokens.depth, 'block')}, width {tokens.width}, {_count(tokens.heads, 'head')}, "
        f"{manifest.precision}, opset {manifest.opset}",
    )
    yield "input", f"pixel_values (batch, 3, {height}, {width}) float32"
    others = tokens.prefix - tokens.class_token
    parts = ["CLS"] if tokens.class_token else []
    parts += [_count(others, "other prefix token")] if others else []
    parts += [f"{tokens.patches} patches ({rows} x {cols})"]
    yield (
        "tokens",
        f"{', '.join(parts)}; {_count(tokens.test_time_registers, 'test-time register')}",
    )


def _redirect(manifest: Manifest, neurons: Neurons) -> Iterator[tuple[str, str]]:
    options, sites = manifest.redirect, manifest.sites
    per_layer = Counter(n.layer for n in neurons.neurons)
    where = ", ".join(f"{count} in layer {layer}" for layer, count in sorted(per_layer.items()))
    yield "neurons", f"{_count(len(neurons.neurons), 'register neuron')}: {where}"
    yield (
        "outliers",
        f"patch norm above {manifest.threshold:.6g} at the output of layer "
        f"{manifest.detection_layer}",
    )
    scale = ", ".join(f"{s:g}" for s in options.scale)
    yield (
        "redirect",
        f"value {options.value}, cls {options.cls}, patches {options.patches}, scale {scale}",
    )
    yield (
        "rewrite",
        f"{_count(sites.token, 'token site')}, {_count(sites.redirect, 'redirect site')}, "
        f"{_count(sites.output, 'output site')}, {_count(len(sites.mended), 'token count')} mended",
    )
    yield from _variant(manifest)


def _variant(manifest: Manifest) -> Iterator[tuple[str, str]]:
    made = manifest.constants
    if made is None:
        yield "variant", "token: a test-time register runs through the network"
        return
    yield (
        "variant",
        f"kv: neurons zero in the weights, constant keys and values in "
        f"{_count(manifest.sites.attention, 'attention')}, from layer {made.first_layer} on",
    )
    yield (
        "",
        f"averaged over {_count(made.images, 'image')}; error to the variant token by first layer, "
        f"on {_count(made.measured_images, 'image')}: "
        + ", ".join(
            f"{'none' if i == manifest.tokens.depth else i} {error:.2g}"
            for i, error in made.errors.items()
        ),
    )


def _cuda(manifest: Manifest) -> Iterator[tuple[str, str]]:
    fused = manifest.cuda
    if fused is None:
        yield "ort-cuda", manifest.cuda_missing or "no graph of its own (an older export)"
        return
    parts = [
        _count(fused.attentions, "attention"),
        _count(fused.norms, "residual norm"),
        _count(fused.gelus, "GELU"),
    ]
    yield "ort-cuda", f"fused: {', '.join(parts)}; of the patched graph"
    if fused.operators:
        yield (
            "",
            f"{_count(fused.operators, 'CUDA operator')} of regraft's own, for build to compile",
        )
    if fused.shape_nodes:
        yield "", f"{_count(fused.shape_nodes, 'Shape node')} left, which runs on the CPU"


def _files(bundle: Bundle) -> Iterator[tuple[str, str]]:
    manifest = bundle.manifest
    yield from _cuda(manifest)
    yield "graphs", ", ".join(f"{name} ({file})" for name, file in manifest.graphs.items())
    for name, record in sorted(manifest.files.items()):
        yield "file", f"{name}, {_size(record.bytes)}"
    yield "written by", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())
    if not manifest.verified:
        yield (
            "verified",
            f"the same rewrite in fp32; the {manifest.precision} graph itself is unverified "
            "until `regraft build` verifies it on an engine that runs it",
        )
    elif VERIFY in manifest.files:
        yield "verified", _verdict(bundle.verification())


def _verdict(verification: Mapping[str, Any]) -> str:
    count = verification.get("images")
    return "at export" + (f", on {_count(count, 'image')}" if isinstance(count, int) else "")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:g} bytes"
        count /= 1000
    return f"{count:.3g} GB"
