"""What ``regraft find`` found: figures for machines, and a summary for people."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from regraft.wording import counted

if TYPE_CHECKING:
    from regraft_export.finding.find import Found


def figures(args: argparse.Namespace, found: Found) -> dict[str, Any]:
    """What ``--json`` prints."""
    about = found.neurons.about
    return {
        "out": args.out,
        "neurons": [[n.layer, n.index] for n in found.neurons.neurons],
        "layers": list(found.neurons.layers),
        "detection_layer": about["detection_layer"],
        "threshold": about["threshold"],
        "images": about["images"],
        "report": about["report"],
        "seconds": dict(found.seconds),
        "selection_runs": found.runs,
    }


def summary(args: argparse.Namespace, found: Found) -> Iterator[str]:
    """The lines that are printed without ``--json``, a table among them."""
    neurons, about = found.neurons, found.neurons.about
    images, report = about["images"], about["report"]
    before = report["before"]
    where = ", ".join(f"{len(neurons.of(layer))} in layer {layer}" for layer in neurons.layers)
    yield f"{args.model}: {counted(len(neurons.neurons), 'register neuron')} ({where})"
    yield (
        f"outlier tokens: patch norm above {about['threshold']:.4g} at layer "
        f"{about['detection_layer']} (median {before['median_norm']:.4g}), "
        f"{before['outlier_share']:.2%} of the patches"
    )
    yield (
        f"images: {images['score']} to score, {images['select']} to select, {images['report']} "
        f"for this table ({report['output']} output)"
    )
    if about.get("precision") == "bf16":
        yield "run as its float32 twin: ONNX Runtime has no bfloat16 on the CPU"
    yield ""
    yield from _table(report)
    yield ""
    seconds = found.seconds
    yield (
        f"{sum(seconds.values()):.1f} s: detection {seconds['detection']:.1f}, scoring "
        f"{seconds['scoring']:.1f}, selection {seconds['selection']:.1f} "
        f"({counted(found.runs, 'image')} run), report {seconds['report']:.1f}"
    )
    yield f"written: {args.out}"


def _table(report: dict[str, Any]) -> Iterator[str]:
    rows = {
        "as it is": report["before"],
        "redirected": report["after"],
        "control: random neurons": report["controls"]["random_neurons"],
        "control: zero token alone": report["controls"]["zero_token"],
        "control: zeroed, no register": report["controls"]["zeroed_without_register"],
    }
    yield f"{'':<30}{'outliers':>10}{'largest/median':>16}{'median output cosine':>22}"
    for name, row in rows.items():
        cosine = row.get("output_cosine_median", 1.0)
        yield (
            f"{name:<30}{row['outlier_tokens']:>10}{row['largest_over_median']:>16.2f}"
            f"{cosine:>22.4f}"
        )
