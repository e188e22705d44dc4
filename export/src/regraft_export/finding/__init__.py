"""Finds the register neurons of a Vision Transformer.

- ``parts.py``: the images, and their split by seed into score, select and report parts.
- ``subject.py``: what the rest asks of a model; it is numpy alone and knows of no PyTorch.
- ``pytorch.py``, ``passes.py``: PyTorch modules as subjects (ONNX files: ``foreign/subject.py``).
- ``norms.py``: distributions of patch norms.
- ``outliers.py``: which layer shows outlier tokens, and above which norm.
- ``score.py``: how much each MLP unit contributes to them; ``contributions.py``: of one batch.
- ``judge.py``: whether a redirect removes them, on the select part.
- ``search.py``: the fewest layers and units that pass.
- ``selection.py``: these as register neurons, with what their register receives.
- ``report.py``: what that does on images used for neither, and the gate.
- ``fingerprint.py``: numbers by which a down-projection is recognised in another file.
- ``find.py``: all of that in order.
"""
