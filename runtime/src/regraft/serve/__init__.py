"""The inference server: the Open Inference Protocol over HTTP, and over gRPC as an extra.

From the wire inwards: ``http_app`` and ``grpc_server`` speak a transport; ``rest_request``,
``rest_response`` and ``grpc_codec`` turn its bytes into the messages of ``messages`` and back;
``service`` does what a request asks for, the same for both; ``repository`` knows the models, each of
which (``model``) has a ``signature`` that checks requests, ``pixels`` that decodes images, and a
``batcher`` in front of its engine. ``lifecycle`` starts all of it and ends it without dropping a
request.
"""
