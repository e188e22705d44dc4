"""The Open Inference Protocol over gRPC; needs the extra ``grpc``.

``inference.proto`` has the messages, ``inference.binpb`` is what it compiles to
(``runtime/compile_proto.py``). ``messages`` makes classes of that; ``wire``, ``request`` and
``response`` turn bytes into the messages of ``regraft.serve.messages`` and back; ``methods`` is the
protocol's calls, ``server`` what listens.
"""
