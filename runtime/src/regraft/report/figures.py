"""The charts over the set: histogram of norms, profiles over depth, change of the output."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from regraft.report.charts import Axis, Plot, Series, legend
from regraft.report.markup import Content, Markup, clean, el
from regraft.report.measurement import Measurement
from regraft.report.scales import Scale, log_scale, zero_scale
from regraft.report.wording import (
    COSINE_OF,
    cosine,
    counted,
    looked_at,
    percent,
    short,
    stand_in,
    tick_percent,
)

BINS = 48
_TOUCHED = Series("layer with register neurons", "touched", "triangle")
_MOST_TICKS = 13


def histogram(found: Measurement) -> Markup:
    """Patch norms before and after, and the registers', at the detection layer."""
    layer, threshold = found.manifest.detection_layer, found.manifest.threshold
    before = found.before.norms[:, layer, found.patches].ravel()
    after = found.after.norms[:, layer, found.patches].ravel()
    register = found.after.norms[:, layer, found.registers].ravel()
    scale = log_scale(np.concatenate([before, after, register, [threshold]]), margin=1.08)
    edges = np.geomspace(scale.lo, scale.hi, BINS + 1)
    counts = [histogram_counts(values, edges) for values in (before, after, register)]
    most = max(int(c.max()) for c in counts)
    heights = Scale(0.7, max(most * 1.3, 10.0), "log")
    plot = Plot(
        Axis(scale, f"L2 norm at the output of layer {layer} (logarithmic)", scale.ticks(), short),
        Axis(heights, "Tokens per bin (logarithmic)", _powers_of_ten(most), short),
    )
    series = [
        Series("patches before", "before area", "area"),
        Series("patches after", "after"),
        Series("test-time register", "register dashed"),
    ][: 3 if register.size else 2]
    drawn = plot.draw(
        "Histogram of token norms before and after the patch",
        *(plot.steps(s, list(edges), c.tolist()) for s, c in zip(series, counts, strict=False)),
        plot.mark(threshold, f"threshold {short(threshold)}"),
    )
    caption = (
        f"{counted(before.size, 'patch', 'patches')} before and after, "
        f"{counted(register.size, 'register')}; {BINS} bins of equal width in the logarithm. "
        "Patches right of the threshold are outlier tokens."
    )
    return _figure("Norms at the detection layer", drawn, legend(series), caption)


def histogram_counts(values: NDArray[np.float32], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many values each bin holds; those outside count in the outermost bins."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def profile(found: Measurement) -> Markup:
    """Median and largest patch norm and the register's norm, over depth."""
    rows = layer_figures(found)
    depth = len(rows)
    every = [value for row in rows for key, value in row.items() if "norm" in key]
    heights = log_scale(every, margin=1.15)
    plot = Plot(_layers(depth), Axis(heights, "L2 norm (logarithmic)", heights.ticks(), short))
    lines = {
        "norm_largest_before": Series("largest before", "before", "dots"),
        "norm_largest_after": Series("largest after", "after", "dots"),
        "norm_register": Series("register", "register", "dots"),
        "norm_median_before": Series("median before", "before dashed"),
        "norm_median_after": Series("median after", "after dashed"),
    }
    lines = {key: series for key, series in lines.items() if key in rows[0]}
    several = len(found.samples) > 1
    median = several and "norm_register" in lines
    register = "; the register's is the median over images" if median else ""
    images = "all images" if several else "the image"
    drawn = _by_layer(found, plot, "Token norms by layer", lines, short)
    return _figure(
        "Norms over depth",
        drawn,
        legend([*lines.values(), _TOUCHED]),
        f"At the output of each layer, over all patches of {images}{register}.",
    )


def attention(found: Measurement) -> Markup:
    """Share of CLS attention on the register, and before the patch on the outlier tokens."""
    rows = layer_figures(found)
    largest = max(max(row["attention_register"], row["attention_outliers"]) for row in rows)
    heights = zero_scale(largest)
    what = looked_at(found.manifest.tokens.class_token)
    plot = Plot(
        _layers(len(rows)),
        Axis(heights, f"Share of the {what}", heights.ticks(0.15), tick_percent),
    )
    lines = {
        "attention_register": Series(
            f"on the {stand_in(found.manifest.variant)}, after", "register", "dots"
        ),
        "attention_outliers": Series("on the outlier tokens, before", "before dashed", "dots"),
    }
    drawn = _by_layer(found, plot, f"Share of the {what} by layer", lines, percent)
    over = " and images" if len(found.samples) > 1 else ""
    return _figure(
        "Attention over depth",
        drawn,
        legend([*lines.values(), _TOUCHED]),
        f"Mean over heads{over}. Outlier tokens are those of the detection layer, the same "
        "places in every layer.",
    )


def _by_layer(
    found: Measurement,
    plot: Plot,
    title: str,
    lines: dict[str, Series],
    text: Callable[[float], str],
) -> Markup:
    """One line per figure over the layers, with detection and touched layers marked."""
    rows = layer_figures(found)
    return plot.draw(
        title,
        plot.mark(found.manifest.detection_layer, "detection layer"),
        plot.feet(_TOUCHED, found.manifest.layers),
        *(
            plot.line(
                series,
                list(range(len(rows))),
                [row[key] for row in rows],
                [f"layer {i}, {series.name}: {text(row[key])}" for i, row in enumerate(rows)],
            )
            for key, series in reversed(lines.items())
        ),
    )


def outputs(found: Measurement) -> Markup:
    """How much the model's output changes, against how many outlier tokens the image had."""
    effects = [sample.effect for sample in found.samples]
    xs = [effect.before.outliers for effect in effects]
    ys = [effect.cosine_median for effect in effects]  # of one image, so it is that image's cosine
    right = max(max(xs), 4) * 1.06
    span = max(1 - min(ys), 1e-4)
    across, heights = Scale(-right * 0.04, right), Scale(1 - span * 1.15, 1 + span * 0.05)
    whole = [tick for tick in Scale(0, right).ticks() if tick == int(tick)]
    what = COSINE_OF[found.effect.cosine_of]
    plot = Plot(
        Axis(across, "Outlier tokens of the image, before", whole, short),
        Axis(heights, f"Cosine of the {what} to the unpatched model", heights.ticks(0.15), short),
    )
    titles = [
        f"{clean(sample.name)}: {counted(x, 'outlier token')}, cosine {cosine(y)}"
        for sample, x, y in zip(found.samples, xs, ys, strict=True)
    ]
    return _figure(
        "Change of the output",
        plot.draw(
            "Output cosine against number of outlier tokens",
            plot.points(Series("image", "after"), xs, ys, titles),
        ),
        f"One dot per image. Median {cosine(found.effect.cosine_median)}, smallest "
        f"{cosine(found.effect.cosine_smallest)}.",
    )


def layer_figures(found: Measurement) -> list[dict[str, float]]:
    """The numbers behind the two charts over depth, by layer; ``norm_register`` if there is one."""
    before = found.before.norms[:, :, found.patches]
    after = found.after.norms[:, :, found.patches]
    registers = found.after.norms[:, :, found.registers]
    on_outliers = found.attention_on_outliers()
    return [
        {
            "norm_median_before": float(np.median(before[:, i])),
            "norm_median_after": float(np.median(after[:, i])),
            "norm_largest_before": float(before[:, i].max()),
            "norm_largest_after": float(after[:, i].max()),
            **({"norm_register": float(np.median(registers[:, i]))} if registers.size else {}),
            "attention_register": found.effect.register_attention[i],
            "attention_outliers": float(on_outliers[i]),
        }
        for i in range(found.manifest.tokens.depth)
    ]


def _layers(depth: int) -> Axis:
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100) if depth / s <= _MOST_TICKS)
    return Axis(Scale(-0.4, depth - 0.6), "Layer", list(range(0, depth, step)), short)


def _powers_of_ten(most: int) -> list[float]:
    return [10.0**i for i in range(8) if 10**i <= max(most * 1.3, 10)]


def _figure(title: str, *content: Content) -> Markup:
    *parts, caption = content
    return el("figure", el("h3", title), *parts, el("figcaption", caption), class_="chart")
