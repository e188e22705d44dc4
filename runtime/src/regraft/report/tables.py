"""The page's tables: controls, parity, figures by layer, and plain facts.

``neurons.json`` and ``verify.json`` may be written by hand or by another version, so that every
value is looked at before it is shown: what is missing or no number becomes a dash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regraft.bundle import VERIFY, Bundle
from regraft.neurons import Neurons
from regraft.report.figures import layer_figures
from regraft.report.markup import Content, Markup, clean, el, fragment
from regraft.report.measurement import Measurement
from regraft.report.wording import DASH, cosine, count, counted, percent, short, stand_in

_CONDITIONS = {
    "random_neurons": "control: as many random neurons, redirected",
    "zero_token": "control: a plain zero token, no redirect",
    "zeroed_without_register": "control: the neurons zeroed, no register",
}


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Content]],
    *,
    words: int = 1,
    strong: int | None = None,
) -> Markup:
    """A table that scrolls by itself where the screen is narrow.

    Args:
        head: column titles.
        rows: cells.
        words: so many columns from the left are text; the others are numbers, set to the right.
        strong: the row that is set off.
    """
    kinds = ["words" if i < words else "number" for i in range(len(head))]
    body = (
        el(
            "tr",
            (
                el("th" if j == 0 else "td", cell, class_=kind, scope="row" if j == 0 else None)
                for j, (cell, kind) in enumerate(zip(row, kinds, strict=True))
            ),
            class_="main" if i == strong else None,
        )
        for i, row in enumerate(rows)
    )
    titles = (el("th", h, class_=k, scope="col") for h, k in zip(head, kinds, strict=True))
    inner = el("table", el("thead", el("tr", titles)), el("tbody", body))
    return el("div", inner, class_="scroll", tabindex=0)


def facts(rows: Iterable[tuple[str, Content]]) -> Markup:
    """Terms and what they are."""
    return el("dl", ((el("dt", name), el("dd", value)) for name, value in rows))


def controls(neurons: Neurons) -> Markup:
    """What `regraft find` measured, with the controls; or why there is nothing."""
    report = neurons.about.get("report")
    if not isinstance(report, Mapping):
        return el(
            "p",
            "The bundle's neurons.json has no report of ",
            el("code", "regraft find"),
            " (a hand-made list of neurons), so there are no controls: nothing here says that "
            "other neurons would not do as well.",
            class_="missing",
        )
    conditions = [("as it is", report.get("before")), ("redirected", report.get("after"))]
    given = report.get("controls")
    for key, row in given.items() if isinstance(given, Mapping) else ():
        conditions.append((_CONDITIONS.get(key, clean(f"control: {key}")), row))
    rows = [_condition(name, row if isinstance(row, Mapping) else {}) for name, row in conditions]
    head = ("Condition", "Outlier tokens", "Removed", "Largest norm ÷ median", "Register norm")
    cosines = ("Output cosine, median", "Output cosine, smallest")
    images = counted(report["images"], "image") if _is_count(report.get("images")) else "images"
    return fragment(
        table((*head, *cosines), rows, strong=1),
        el(
            "p",
            "Measured in PyTorch by ",
            el("code", "regraft find"),
            f" on {images} used neither for scoring nor for selecting neurons, not on those of "
            f"this page. The cosine compares the model's "
            f"{clean(str(report.get('output', 'own')))} output with that of the unpatched "
            "model. Zeroing without a register can look as good as the redirect in these figures; "
            "on the models of arXiv 2506.08010 it costs accuracy, which this table does not "
            "measure.",
            class_="note",
        ),
    )


def _condition(name: str, row: Mapping[str, Any]) -> list[Content]:
    return [
        name,
        _number(row.get("outlier_tokens"), lambda v: count(round(v))),
        _number(row.get("removed"), percent),
        _number(row.get("largest_over_median"), lambda v: f"{v:.2f}"),
        _number(row.get("register_norm"), short),
        _number(row.get("output_cosine_median"), cosine),
        _number(row.get("output_cosine_smallest"), cosine),
    ]


def parity(bundle: Bundle) -> Markup:
    """What export verified; or that it says nothing."""
    if VERIFY not in bundle.manifest.files:
        return el(
            "p", "The bundle has no verify.json: its parity is not recorded.", class_="missing"
        )
    data = bundle.verification()
    comparisons = [c for c in _list(data.get("parity")) if isinstance(c, Mapping)]
    if not comparisons:
        return el("p", "The bundle's verify.json compares nothing.", class_="missing")
    shown = [c for c in comparisons if not _is_probe(c) or c.get("passed") is not True]
    probes = [c for c in comparisons if _is_probe(c) and c.get("passed") is True]
    rows = [_comparison(c) for c in shown]
    if probes:
        worst = max(
            (c["relative_error"] for c in probes if _is_number(c.get("relative_error"))),
            default=None,
        )
        rows.append(
            [
                "probe, probe_baseline",
                f"{counted(len(probes), 'output')}, the largest error",
                _number(worst, lambda v: f"{v:.1e}"),
                DASH,
                DASH,
                "passed",
            ]
        )
    rows.append(_limits(data.get("limits")))
    head = ("Graph", "Output", "Relative error", "Token cosine, 1st percentile")
    verdict = "passed" if data.get("passed") is True else "FAILED"
    return fragment(
        table((*head, "Image cosine, smallest", "Verdict"), rows, words=2),
        el(
            "p",
            clean(
                f"Export compared {data.get('engine')} ({data.get('precision')}) with "
                f"{data.get('reference')} on {data.get('images')} images: {verdict}."
            ),
            None if bundle.manifest.verified else _unverified(bundle.manifest.precision),
            class_="note",
        ),
    )


def _unverified(precision: str) -> Markup:
    return fragment(
        f" Verified as its fp32 twin only, not in {precision}, which ort-cpu cannot run; ",
        el("code", "regraft build"),
        " with an engine that runs it settles it.",
    )


def _comparison(row: Mapping[str, Any]) -> list[Content]:
    passed = row.get("passed") is True
    return [
        clean(str(row.get("graph", DASH))),
        el("code", clean(str(row.get("output", DASH)))),
        _number(row.get("relative_error"), lambda v: f"{v:.1e}"),
        _number(row.get("token_cosine"), lambda v: f"{v:.6f}"),
        _number(row.get("image_cosine"), lambda v: f"{v:.6f}"),
        "passed" if passed else el("b", "FAILED"),
    ]


def _limits(limits: Any) -> list[Content]:
    given = limits if isinstance(limits, Mapping) else {}
    return [
        "limit",
        "",
        _number(given.get("relative_error"), lambda v: f"≤ {v:.0e}"),
        _number(given.get("token_cosine"), lambda v: f"≥ {v:g}"),
        _number(given.get("image_cosine"), lambda v: f"≥ {v:g}"),
        "",
    ]


def by_layer(found: Measurement) -> Markup:
    """The numbers behind the charts over depth."""
    head = ("Layer", "Median norm, before", "after", "Largest norm, before", "after")
    variant = found.manifest.variant
    shares = ("Register norm", f"Attention on {stand_in(variant)}", "on outlier tokens, before")
    neurons = set(found.manifest.layers)
    rows = [
        [
            f"{i}{' ▲' if i in neurons else ''}",
            short(row["norm_median_before"]),
            short(row["norm_median_after"]),
            short(row["norm_largest_before"]),
            short(row["norm_largest_after"]),
            short(row["norm_register"]) if "norm_register" in row else DASH,
            percent(row["attention_register"]),
            percent(row["attention_outliers"]),
        ]
        for i, row in enumerate(layer_figures(found))
    ]
    return table((*head, *shares), rows)


def _is_probe(row: Mapping[str, Any]) -> bool:
    return str(row.get("graph", "")).startswith("probe")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any, written: Any) -> str:
    return written(value) if _is_number(value) else DASH
