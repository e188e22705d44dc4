"""Shapes for any number of images, and for one number of them."""

from __future__ import annotations

import numpy as np
import onnx.parser

from regraft_export.graph.cuda.inferred_shapes import inferred_shapes


def test_lengths_that_depend_on_the_images() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float[batch, 6, 4] x) => (float[batch, 6, 64] y)
        <int64[3] heads = {-1, 3, 4}, int64[3] images = {-1, 6, 64}>
        { m = MatMul(x, w) z = Reshape(x, heads) y = Reshape(m, images) }"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 64), np.float32), "w"))
    size = model.ByteSize()
    assert inferred_shapes(model)["m"] == ("batch", 6, 64)
    assert isinstance(inferred_shapes(model)["z"][0], str)
    for images in (2, 3):
        found = inferred_shapes(model, images)
        assert found["m"] == found["y"] == (images, 6, 64)
        assert found["z"] == (2 * images, 3, 4)
    assert model.ByteSize() == size
