"""The Open Inference Protocol over gRPC, and gRPC's own health check; needs the extra ``grpc``.

``inference.proto`` and ``health.proto`` have the messages, the files ``.binpb`` are what they
compile to (``runtime/compile_proto.py``). ``messages`` makes classes of that; ``wire``, ``request``
and ``response`` turn bytes into the messages of ``regraft.serve.messages`` and back; ``methods`` is
the protocol's calls, ``server`` what listens.
"""
