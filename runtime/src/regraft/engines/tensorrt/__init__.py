"""TensorRT 10.13 to 11.x: compiled on the machine that runs it, executed without PyTorch.

- ``builder``: ONNX graph -> plan.
- ``inspect``: what the builder made of it.
- ``engine``: the engine, which opens a plan from the cache and nothing else.
- ``runner``: buffers and CUDA graphs.
- ``listeners``: TensorRT's log and progress, brought to Python's.

The builder is tested by compiling (``tests/tensorrt_rig``); execution was never run on a card where
this was written, only against a fake one (``tests/runtime/engines/test_tensorrt_runner.py``).

``tensorrt`` and ``cuda`` are imported inside functions: neither need be installed.
"""
