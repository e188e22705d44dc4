"""Runs the probe graphs over images and keeps what the page shows.

Memory grows with the images, by (layers x tokens x 16 bytes) and one small picture each; a page of
more than a few hundred would be of no use anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regraft.bundle import Bundle
from regraft.effect import Effect, EffectMeter
from regraft.engines import EngineOptions
from regraft.errors import EngineError, ImageError, InputError
from regraft.images import ImageSource, decode
from regraft.manifest import Manifest
from regraft.preprocessing import Preprocessing
from regraft.report.measurement import Measurement, Sample, State
from regraft.verification import Engines
from regraft.wording import none_read

ENGINE = "ort-cpu"
# Of the longer edge, in pixels: 16 pictures of noise are then 6 MB of PNG, photos much less.
PICTURE_EDGE = 300

_Outputs = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Source:
    """An image to show.

    Attributes:
        file: where it is, or what :func:`regraft.images.decode` takes instead.
        name: what the page calls it.
    """

    file: ImageSource
    name: str


def measure(
    bundle: Bundle,
    sources: Sequence[Source],
    *,
    options: EngineOptions | None = None,
    engines: Engines | None = None,
    batch_size: int = 8,
    on_error: Callable[[Source, ImageError], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Measurement:
    """Runs both probe graphs over images.

    Args:
        bundle: one with probe graphs.
        sources: the images.
        options: of the engine.
        engines: the bundle's on :data:`ENGINE`, which stay open; None opens and closes its own.
        batch_size: images per run.
        on_error: called for each image that cannot be read, which is then left out; without it
            the first one raises.
        on_batch: called with each batch's size, for progress.

    Raises:
        BundleError: the bundle was exported with ``--no-baseline``.
        EngineError: the engine failed, or norms, attention or outputs are NaN or infinite.
        ImageError: an image cannot be read, and there is no ``on_error``.
        InputError: no image could be read.
    """
    manifest = bundle.manifest
    total, samples = EffectMeter(manifest), list[Sample]()
    before, after = list[State](), list[State]()
    with ExitStack() as stack:
        engines = engines or stack.enter_context(Engines(bundle, ENGINE, options))
        probes = {"probe_baseline": engines["probe_baseline"], "probe": engines["probe"]}
        engine = _described(probes["probe"].name, probes["probe"].details())
        pictures = _pictures(sources, manifest.preprocessing, on_error)
        for names, views, pixels in _batches(pictures, batch_size):
            seen = {graph: probe.run(pixels) for graph, probe in probes.items()}
            for graph, outputs in seen.items():
                _expect_finite(graph, outputs, names)
            total.update(seen["probe_baseline"], seen["probe"])
            before.append(_state(seen["probe_baseline"], manifest.tokens.depth))
            after.append(_state(seen["probe"], manifest.tokens.depth))
            samples += [
                Sample(name, view, _effect_of(i, seen, manifest))
                for i, (name, view) in enumerate(zip(names, views, strict=True))
            ]
            if on_batch:
                on_batch(len(names))
    if not samples:
        raise InputError(none_read(len(sources)))
    return Measurement(
        manifest, tuple(samples), _joined(before), _joined(after), total.result(), engine
    )


def _pictures(
    sources: Sequence[Source],
    preprocessing: Preprocessing,
    on_error: Callable[[Source, ImageError], None] | None,
) -> Iterator[tuple[str, Image.Image, NDArray[np.float32]]]:
    """Name, picture for the page, and pixels (3, H, W) of each image that can be read."""
    for source in sources:
        try:
            image = decode(source.file)
        except ImageError as error:
            if on_error is None:
                raise
            on_error(source, error)
            continue
        view = preprocessing.view(image).copy()  # it may be `image` itself, and is shrunk in place
        view.thumbnail((PICTURE_EDGE, PICTURE_EDGE), Image.Resampling.LANCZOS)
        yield source.name, view, preprocessing(image)


def _batches(
    pictures: Iterator[tuple[str, Image.Image, NDArray[np.float32]]], size: int
) -> Iterator[tuple[list[str], list[Image.Image], NDArray[np.float32]]]:
    names, views, pixels = list[str](), list[Image.Image](), list[NDArray[np.float32]]()
    for name, view, array in pictures:
        names.append(name)
        views.append(view)
        pixels.append(array)
        if len(names) == size:
            yield names, views, np.stack(pixels)
            names, views, pixels = [], [], []
    if names:
        yield names, views, np.stack(pixels)


def _expect_finite(graph: str, outputs: _Outputs, names: Sequence[str]) -> None:
    for output, array in outputs.items():
        bad = [name for name, row in zip(names, array, strict=True) if not np.isfinite(row).all()]
        if bad:
            raise EngineError(
                f"{ENGINE}: {output} of {graph} holds NaN or infinity for {', '.join(bad)}; "
                "expected finite numbers: check the model's weights, or export with "
                "--precision fp32"
            )


def _state(outputs: _Outputs, depth: int) -> State:
    return State(
        norms=np.stack([outputs[f"norms.{i}"] for i in range(depth)], axis=1),
        attention=_stacked([outputs[f"attentions.{i}"].mean(axis=1) for i in range(depth)]),
    )


def _stacked(shares: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """(N, layers, T): in the variant kv the first layers lack the constants' column."""
    widest = max(share.shape[1] for share in shares)
    padded = [np.pad(share, ((0, 0), (0, widest - share.shape[1]))) for share in shares]
    return np.stack(padded, axis=1)


def _joined(states: Sequence[State]) -> State:
    return State(
        norms=np.concatenate([state.norms for state in states]),
        attention=np.concatenate([state.attention for state in states]),
    )


def _effect_of(i: int, seen: Mapping[str, _Outputs], manifest: Manifest) -> Effect:
    one = EffectMeter(manifest)
    baseline, patched = (
        {name: array[i : i + 1] for name, array in seen[graph].items()}
        for graph in ("probe_baseline", "probe")
    )
    one.update(baseline, patched)
    return one.result()


def _described(name: str, details: Mapping[str, str]) -> str:
    parts = ", ".join(f"{key} {value}" for key, value in details.items())
    return f"{name} ({parts})" if parts else name
