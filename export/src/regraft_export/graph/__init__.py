"""Rewrites of an ONNX graph, with onnx-graphsurgeon; one rewrite per file.

- ``document.py``: reading and writing a graph, names, spans of nodes.
- ``anchors.py``: where in a graph the tokens enter, blocks end, down-projections sit.
- ``token_axis.py``, ``shape_values.py``, ``shape_arithmetic.py``, ``dims.py``: follow the token
  axis through every operator and find baked token counts.
- ``token_rules.py``, ``token_sums.py``, ``token_moves.py``, ``token_reshapes.py``: what each
  operator does to it.
- ``value_bounds.py``, ``interval.py``: between which numbers all elements of a tensor lie, whatever
  the images.
- ``drop_neutral_mask.py``: rewrite: attention masks that mask nothing go.
- ``append_register.py``: rewrite: the register enters, token counts grow.
- ``rotary_tables.py``: rewrite: rotary positions become constants, with rows for the register.
- ``redirect_neurons.py``: rewrite: a down-projection's register neurons go to the register.
- ``remove_register.py``: rewrite: the register is cut off before anything pools or leaves.
- ``silence_neurons.py``: rewrite: a down-projection's register neurons become zeros (variant kv).
- ``attention_sites.py``: where in a block's attention keys and values are read.
- ``add_constants.py``: rewrite: an attention sees constant keys and values (variant kv).
- ``attention_outputs.py``, ``norm_outputs.py``: rewrites that add outputs.
- ``patch.py``: all of them in order.
- ``count_sites.py``: the sites they left in the finished graph, counted; none may be lost.
"""
