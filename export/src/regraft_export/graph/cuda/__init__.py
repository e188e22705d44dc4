"""Rewrites for ONNX Runtime's CUDA provider: the graph whose kernels are few and large.

They make another graph beside the portable one (``model.cuda.onnx``), for baseline and patched
alike; :mod:`regraft_export.graph.cuda.fuse` has their order. What each one saves was profiled on an
H200 for the fused graph they start from; what they give together has to be measured.
"""
