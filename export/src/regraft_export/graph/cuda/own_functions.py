"""What regraft's own operators stand for, as ONNX functions.

No CPU has kernels for them. With these functions in the file, ONNX Runtime puts the nodes that they
stand for in their place, so that a graph with operators can be verified anywhere.
"""

from __future__ import annotations

import onnx
import onnx.parser

from regraft_export.graph.cuda.redirect_operator import DOMAIN, SUFFIXES

_LAST_ROW = """
    one = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    first = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    others = Slice (residual, first, last, one)
    old = Slice (residual, last, end, one)
    new = Add (old, added)
    sum = Concat <axis = 1> (others, new)
"""
_MOST = """
    axes = Constant <value_ints = [1]> ()
    columns = Gather <axis = 2> (hidden, neurons)
    signed = Mul (columns, signs)
    most = ReduceMax (signed, axes)
    added = MatMul (most, down)
"""
_ADDED_ROW = "added = Identity (row)\n" + _LAST_ROW
_BODIES = {
    "AddRedirected": ("(hidden, residual, neurons, signs, down) => (sum)", _MOST + _LAST_ROW),
    "AddRow": ("(residual, row) => (sum)", _ADDED_ROW),
    "Product": ("(x, weight) => (y)", "y = MatMul (x, weight)\n"),
    "BiasedProduct": (
        "(x, weight, bias) => (y)",
        "product = MatMul (x, weight)\ny = Add (product, bias)\n",
    ),
}
# Of x with its bias.
ACTIVATIONS = {
    "BiasedGelu": "hidden = Gelu (h)\n",
    "BiasedQuickGelu": "number = Constant <value_float = 1.702> ()\n"
    "factor = CastLike (number, h)\n"
    "scaled = Mul (h, factor)\n"
    "part = Sigmoid (scaled)\n"
    "hidden = Mul (h, part)\n",
    "BiasedSwiGlu": "gate, value = Split <axis = -1, num_outputs = 2> (h)\n"
    "part = Sigmoid (gate)\n"
    "open = Mul (gate, part)\n"
    "hidden = Mul (open, value)\n",
}
for _name, _body in ACTIVATIONS.items():
    _body = "h = Add (x, bias)\n" + _body
    _BODIES |= {
        _name: ("(x, bias) => (hidden)", _body),
        f"{_name}Redirected": (
            "(x, bias, residual, neurons, signs, down) => (hidden, sum)",
            _body + _MOST + _LAST_ROW,
        ),
        f"{_name}Row": ("(x, bias, residual, row) => (hidden, sum)", _body + _ADDED_ROW),
    }


def _three_products(biased: int) -> tuple[str, str]:
    """Of three products of x, the first ones with a bias."""
    biases = [f"b{i}" for i in range(biased)]
    lines = [f"p{i} = MatMul (x, w{i})\ny{i} = Add (p{i}, b{i})" for i in range(biased)]
    lines += [f"y{i} = MatMul (x, w{i})" for i in range(biased, 3)]
    ports = f"({', '.join(['x', 'w0', 'w1', 'w2', *biases])}) => (y0, y1, y2)"
    return ports, "\n".join(lines)


_BODIES |= {f"ThreeProducts{biased}Biased": _three_products(biased) for biased in range(4)}


def spell_out(proto: onnx.ModelProto) -> None:
    """Adds the functions of all operators in a graph; changes it in place."""
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    used = {node.op_type for node in proto.graph.node if node.domain == DOMAIN}
    for name, (ports, body) in _BODIES.items():
        for suffix in SUFFIXES.values():
            if f"{name}_{suffix}" in used:
                head = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">'
                text = f"{head}\n{name}_{suffix} {ports}\n{{\n{body}\n}}"
                proto.functions.append(onnx.parser.parse_function(text))
