"""ONNX Runtime on CUDA: the graph that export made for it, without PyTorch.

- ``engine``: the engine, and how it is built and opened.
- ``remedies``: why it cannot run or failed, and what to do about it.
- ``runner``: three streams, and one CUDA graph per slot of a batch size.
- ``one_thread``: why runs of one session stay on one thread.
- ``gate``: what may not happen while ONNX Runtime records, in whatever engine.
- ``slot``: one batch in its buffers, on its way in, computed, or on its way back.

Tests put a fake card in its place (``tests/runtime/engines/test_ort_cuda.py``), whose streams put
work off as late as they may; `make test-gpu` runs it on a real one.
"""
