"""ONNX Runtime on CUDA: the graph that export made for it, without PyTorch.

- ``engine``: the engine, and what can go wrong when it opens.
- ``runner``: buffers on the card, pinned staging, one CUDA graph per batch size.
- ``one_thread``: why runs of one session stay on one thread.

Never run on a card where this was written: tests put a fake card in its place
(``tests/runtime/engines/test_ort_cuda.py``); `make test-gpu` runs it where there is one.
"""
