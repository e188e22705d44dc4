"""The inference server: the Open Inference Protocol over HTTP and gRPC.

From the wire inwards: ``http_app`` speaks the transport; ``rest_request`` and ``rest_response``
turn its bytes into the messages of ``messages`` and back; the package ``grpc`` does both for the
other transport; ``service`` does what a request asks
for; ``repository`` knows the models, each of which (``model``) has a ``signature`` that checks
requests, ``pixels`` that decodes images, and a ``batcher`` in front of its engine. ``lifecycle``
starts all of it and ends it without dropping a request.
"""
