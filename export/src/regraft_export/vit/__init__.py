"""A PyTorch Vision Transformer seen the way the method needs it: blocks, neurons, token order.

- ``structure.py``: finds all of that in a module; ``run_once.py`` runs it once for that.
- ``observe.py``: one forward pass with block outputs, registers and CLS attention recorded.
- ``constant_keys.py``: changes the keys and values of a block's attention, whatever its class.
- ``hooks.py``: the redirect by hooks, the reference that every rewrite is compared with.
"""
