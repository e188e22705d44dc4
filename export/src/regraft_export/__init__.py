"""regraft-export: finds register neurons in PyTorch and writes patched ONNX bundles."""

__version__ = "0.1.0"
