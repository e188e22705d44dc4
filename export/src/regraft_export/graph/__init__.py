"""Rewrites of an ONNX graph, with onnx-graphsurgeon; one rewrite per file.

- ``document.py``: reading and writing a graph, names, spans of nodes.
- ``anchors.py``: where in a graph the tokens enter, blocks end, down-projections sit.
- ``shape_values.py``, ``token_axis.py``: follow the token axis and find baked token counts.
- ``append_register.py``: rewrite: the register enters, baked token counts grow.
- ``redirect_neurons.py``: rewrite: a down-projection's register neurons go to the register.
- ``remove_register.py``: rewrite: the register is cut off before anything pools or leaves.
- ``attention_outputs.py``, ``norm_outputs.py``: rewrites that add outputs.
- ``patch.py``: all of them in order, with the site counts checked.
"""
