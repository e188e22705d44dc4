"""Numeric check of a patched file against the method, written in numpy.

The unpatched file is cut into pieces that treat each token by itself; ONNX Runtime runs them, at
the token count the file was exported for, and a register goes through them as one more token. What
mixes tokens is numpy: attention over T + R tokens, and Algorithm 2. The patched file must give the
same outputs.

Nothing here is shared with the rewrite (``patching.py`` and ``regraft_export.graph``). Shared are
the reading of the file and the survey of its structure: where blocks, down-projections and the
token entry are. That the pieces are right is proven by numbers, on the images: each block, put
together from its pieces, must give what the file's own block gives, and shifted tokens must give
shifted results. A graph where that is not so is refused. What such proofs cannot see is a survey
that counts layers wrongly or takes another product for a down-projection; a file whose number of
attentions and MLPs differ is refused by the survey, and fingerprints in the neurons file tell.

- ``pieces.py``: nodes of a file between tensors, run by ONNX Runtime.
- ``forms.py``: along which axis tokens lie in a tensor.
- ``attention.py``: where a block's attention reads and writes, and attention in numpy.
- ``method.py``: Algorithm 2 in numpy.
- ``blocks.py``: one block as pieces and numpy, proven on the unpatched file.
- ``statement.py``: the network with registers, block after block.
- ``compare.py``: the patched file held to it.
- ``checked.py``: what was found, and the gate.
"""
