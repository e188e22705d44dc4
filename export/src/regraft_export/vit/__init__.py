"""A PyTorch Vision Transformer seen the way the method needs it: blocks, neurons, token order.

- ``structure.py``: finds all of that in a module, ``run_once.py`` by running it; ``parts.py`` is
  what it finds.
- ``positions.py``: proof that an appended register moves no token; ``rotary.py``: the tables it
  needs rows in.
- ``observe.py``: one forward pass with block outputs, registers and CLS attention recorded;
  ``attention_calls.py``: attention seen whatever function computes it.
- ``constant_keys.py``: changes the keys and values of a block's attention, whatever its class.
- ``hooks.py``: the redirect by hooks, the reference that every rewrite is compared with.
"""
