"""What CLS and the patches keep of the neurons that are redirected."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regraft_export.graph.redirect_site import Site


def kept_values(site: Site, stem: str, columns: gs.Variable) -> gs.Variable:
    """What CLS and the patches keep of the neurons, zero elsewhere: (B, T + R, k)."""
    ed, options, layout = site.editor, site.options, site.layout
    registers = [0.0] * options.registers
    cls = 1.0 if options.cls == "keep" else 0.0
    patches = 1.0 if options.patches == "keep" else 0.0
    mask = site.per_token(cls, patches, registers)
    kept = ed.node("Mul", f"{stem}.kept", [columns, mask])
    if options.patches in ("zero", "keep"):
        return kept
    last = layout.count if site.open_count is None else -options.registers
    bounds = [np.array([n], dtype=np.int64) for n in (layout.prefix, last, site.axis)]
    start, end, axis = (ed.constant(f"{stem}.bound", b) for b in bounds)
    inner = ed.node("Slice", f"{stem}.patches", [columns, start, end, axis])
    mean = ed.reduce("ReduceMean", f"{stem}.mean", inner, [site.axis])
    if options.patches == "mean":
        spread = ed.node("Mul", f"{stem}.spread", [mean, site.per_token(0, 1, registers)])
    else:
        spread = _outliers_replaced(site, stem, inner, mean)
    return ed.node("Add", f"{stem}.keep", [kept, spread])


def _outliers_replaced(site: Site, stem: str, inner: gs.Variable, mean: gs.Variable) -> gs.Variable:
    """Patches above mean + 1 standard deviation become the mean; back at their places."""
    ed, layout = site.editor, site.layout
    off = ed.node("Sub", f"{stem}.off", [inner, mean])
    # Squares are taken in float32: in fp16 a deviation of 256 would overflow.
    wide = ed.node("Cast", f"{stem}.wide", [off], {"to": 1}, dtype=np.float32)
    square = ed.node("Mul", f"{stem}.square", [wide, wide])
    variance = ed.reduce("ReduceMean", f"{stem}.variance", square, [site.axis])
    root = ed.node("Sqrt", f"{stem}.root", [variance])
    kind = onnx.helper.np_dtype_to_tensor_dtype(site.dtype)
    deviation = ed.node("Cast", f"{stem}.deviation", [root], {"to": kind}, dtype=site.dtype)
    signs = ed.constant(f"{stem}.signs", site.signs)
    signed = ed.node("Mul", f"{stem}.signed_off", [off, signs])
    above = ed.node("Greater", f"{stem}.above_mean", [signed, deviation], dtype=np.bool_)
    replaced = ed.node("Where", f"{stem}.replaced", [above, mean, inner], dtype=site.dtype)
    pads = np.zeros((2, 3), dtype=np.int64)  # in front and behind, by axis
    pads[:, site.axis] = layout.prefix, site.options.registers
    return ed.node("Pad", f"{stem}.back", [replaced, ed.constant(f"{stem}.pads", pads.ravel())])
