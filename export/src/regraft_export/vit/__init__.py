"""A PyTorch Vision Transformer seen the way the method needs it: blocks, neurons, token order.

- ``structure.py``: finds all of that in a module; ``run_once.py`` runs it once for that.
- ``observe.py``: one forward pass with block outputs, registers and CLS attention recorded.
- ``hooks.py``: the redirect by hooks, the reference that every rewrite is compared with.
"""
