"""ONNX files that somebody else exported: a Vision Transformer in them, patched or searched.

No PyTorch is needed: the graph is all there is, so every place is found by structure.

- ``shapes.py``: every tensor's dimensions at sizes of the inputs that are tried.
- ``constants.py``: weights, also behind a Transpose, Cast or Identity.
- ``trial.py``: these sizes, where the file leaves them open.
- ``reach.py``: which node computes what from what.
- ``mlp.py``: the down-projections, with the residual addition each one ends in.
- ``stacks.py``: stacks of blocks, and which one is meant.
- ``entry.py``: where the tokens enter, and which of them are patches.
- ``survey.py``: all of that of one file; refuses what is none.
- ``exits.py``: rewrite: the registers are cut off wherever tokens leave the stack.
- ``registers.py``: the registers' rows, and which tensors grow with them.
- ``belongs.py``: whether neurons belong to a file.
- ``patching.py``: a patched file from all of them.
- ``check/``: a patched file held to the method in numpy; shares no code with the rewrite.
- ``opening.py``: a file opened for finding, with its preprocessing.
- ``own_output.py``: which of its outputs is the model's own for an image.
- ``instrument.py``: graphs in which any neurons are redirected from outside.
- ``subject.py``: these, run, as finding sees a model.
"""
