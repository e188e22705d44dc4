"""ONNX files of any size, of which only what is needed is read into memory.

- ``wire.py``: fields of a protobuf message, found in a mapped file without parsing it.
- ``stored.py``: a tensor that lies in a file.
- ``read.py``: a model without its large tensors, and where each of them lies.
- ``write.py``: a model with large tensors copied from where they lie.
- ``view.py``: such a model as a graphsurgeon graph to rewrite, and back with all metadata kept.
- ``subgraph.py``: the part of it between some of its tensors.
- ``widen.py``: float16 and bfloat16 as float32, in nodes and whole models.
- ``session.py``: running it on the CPU, weights shared between parts.
"""
