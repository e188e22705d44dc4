"""How close `extract` comes to what decoding and the engine alone would take on the same cores.

Run as ``python -m benchmarks.extract BUNDLE``. Pictures of several megapixels are made, then three
things are timed in turn, in an order that changes every round: decoding and preprocessing alone,
the engine alone on prepared pixels, and both together as ``Extractor.stream`` runs them. On the
same cores the first two cannot overlap for free, so the ideal is their sum.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import RESULTS, circumstances, rounded, write_results
from regraft.bundle import Bundle
from regraft.extractor import Extractor
from regraft.pipeline import batches
from regraft.timing import Ratio, Times, race


def main() -> None:
    """Measures and writes benchmarks/results/extract.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--megapixels", type=float, default=12.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "extract.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = pictures(Path(folder), args.images, args.megapixels)
        result = {**circumstances("benchmarks.extract"), **_measure(args, paths)}
    table = _table(result)
    print("\n".join(table))
    write_results(args.out, result, table)


def pictures(folder: Path, count: int, megapixels: float) -> list[Path]:
    """JPEG files with the texture of photographs, 4:3."""
    height = int((megapixels * 1e6 * 3 / 4) ** 0.5)
    size, rng = (height * 4 // 3, height), np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 6, (*size[::-1], 1)).astype(np.int16)
        picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        paths.append(folder / f"{i:03d}.jpg")
        picture.save(paths[-1], quality=90)
    return paths


def _measure(args: argparse.Namespace, paths: list[Path]) -> dict[str, Any]:
    bundle = Bundle.open(args.bundle)
    figures: dict[str, Any] = {"model": bundle.manifest.model["source"], "images": len(paths)}
    for draft in (False, True):
        with Extractor.open(
            bundle, "ort-cpu", batch_size=args.batch_size, draft=draft
        ) as extractor:
            prepared = [b.pixels for b in _decoded(bundle, paths, args.batch_size, draft)]
            expected = np.concatenate([extractor.run(pixels).patches for pixels in prepared])

            def decode(draft: bool = draft) -> int:
                return sum(len(b.pixels) for b in _decoded(bundle, paths, args.batch_size, draft))

            def engine(extractor: Extractor = extractor, prepared: list[Any] = prepared) -> int:
                return sum(len(extractor.run(pixels)) for pixels in prepared)

            def both(extractor: Extractor = extractor) -> Any:
                return np.concatenate([f.patches for f in extractor.stream(paths)])

            def check(name: str, output: object, expected: Any = expected) -> None:
                if name == "extract" and not np.allclose(output, expected, rtol=1e-4, atol=1e-4):  # type: ignore[arg-type]
                    raise SystemExit("extract returned other features than the engine alone")

            rivals: dict[str, Callable[[], object]] = {
                "decode": decode,
                "engine": engine,
                "extract": both,
            }
            times = race(rivals, seconds=0, rounds=args.rounds, check=check)
        figures["draft" if draft else "exact"] = _figures(times, len(paths))
    return figures


def _decoded(bundle: Bundle, paths: list[Path], batch_size: int, draft: bool) -> Any:
    return batches(paths, bundle.manifest.preprocessing, batch_size, draft=draft)


def _figures(times: dict[str, Times], images: int) -> dict[str, Any]:
    ideal = Times(times["decode"].seconds + times["engine"].seconds)
    reached = Ratio.of(ideal, times["extract"])
    per_image = {name: round(t.median / images * 1e3, 2) for name, t in times.items()}
    return {
        "ms_per_image": per_image,
        "share_of_ideal": rounded(reached, 3),
        "rounds": len(ideal.seconds),
    }


def _table(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{result['model']}, {result['images']} pictures. The share is (decoding alone + engine "
        "alone) over extract: median over rounds with its 95 % interval.",
        "",
        "| decoding | decode ms/image | engine ms/image | extract ms/image | share of the ideal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("exact", "draft"):
        f = result[name]
        ms, share = f["ms_per_image"], "{} ({} to {})".format(*f["share_of_ideal"])
        rows.append(f"| {name} | {ms['decode']} | {ms['engine']} | {ms['extract']} | {share} |")
    return rows


if __name__ == "__main__":
    main()
