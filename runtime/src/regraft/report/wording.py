"""How the page writes numbers, and its headline."""

from __future__ import annotations

from typing import Any

from regraft.effect import Effect, Norms

DASH = "\u2013"
TIMES = "\u00d7"
COSINE_OF = {"pooled": "pooled output", "cls": "CLS token", "patches": "mean patch token"}


def short(number: float) -> str:
    """Four significant digits, without an exponent where that stays readable."""
    if number == 0:
        return "0"
    if 1e-4 <= abs(number) < 1e6:
        digits = f"{number:.4g}"
        return f"{number:.0f}" if "e" in digits else digits
    return f"{number:.2e}"


def percent(share: float) -> str:
    """A share as a percentage: one decimal, more for small ones."""
    value = share * 100
    return f"{value:.1f}%" if value == 0 or abs(value) >= 1 else f"{value:.2g}%"


def tick_percent(share: float) -> str:
    """A round share, for an axis."""
    return f"{share * 100:g}%"


def count(number: int) -> str:
    """A whole number, with commas between thousands."""
    return f"{number:,}"


def counted(number: int, word: str, plural: str | None = None) -> str:
    """A number and its noun."""
    return f"{count(number)} {word if number == 1 else plural or word + 's'}"


def cosine(value: float) -> str:
    """Four decimals."""
    return f"{value:.4f}"


def numbers(values: Any) -> str:
    """Numbers between commas."""
    return ", ".join(f"{value:g}" for value in values)


def looked_at(class_token: bool) -> str:
    """Whose attention the probes hold."""
    return "CLS attention" if class_token else "mean attention of the patches"


def stand_in(variant: str) -> str:
    """What receives the attention that outlier tokens received."""
    return "register" if variant == "token" else "constants"


def over_median(norms: Norms) -> float:
    """Largest patch norm over the median; 0 where every norm is 0."""
    return norms.largest / norms.median if norms.median else 0.0


def headline(effect: Effect) -> str:
    """What the patch did, in one sentence."""
    before, after = over_median(effect.before), over_median(effect.after)
    verb = "falls" if after < before * 0.995 else "rises" if after > before * 1.005 else "stays"
    course = f"from {before:.2f} to {after:.2f}" if verb != "stays" else f"at {after:.2f}"
    median = "" if effect.images == 1 else "median "
    return (
        f"{_outliers(effect)}; the largest patch norm {verb} {course} times the median, and the "
        f"{COSINE_OF[effect.cosine_of]} keeps a {median}cosine of {cosine(effect.cosine_median)} "
        "to the unpatched model."
    )


def _outliers(effect: Effect) -> str:
    had, left = effect.before.outliers, effect.after.outliers
    where = "this image" if effect.images == 1 else counted(effect.images, "image")
    if had == 0 and left == 0:
        return f"There are no outlier tokens in {where}, neither before nor after the patch"
    if left == 0:
        which = {1: "the only outlier token", 2: "both outlier tokens"}.get(
            had, f"all {count(had)} outlier tokens"
        )
        return f"The patch removes {which} in {where}"
    if left < had:
        removed = f"{count(had - left)} of {counted(had, 'outlier token')}"
        return f"The patch removes {removed} in {where} and leaves {count(left)}"
    if left == had:
        return f"The patch removes none of {counted(had, 'outlier token')} in {where}"
    return f"The patch makes outlier tokens more: {count(had)} before, {count(left)} after"
