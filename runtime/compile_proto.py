"""Compiles the gRPC protocol's messages: inference.proto to inference.binpb beside it.

Run as ``python runtime/compile_proto.py``, with grpcio-tools (requirements-dev.txt); a test
fails where it was forgotten. The result is a serialized FileDescriptorSet rather than Python code,
because generated code registers its messages in the process's one pool, where Triton's client has
messages of the same names, and because it is bound to a version of protobuf.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

FOLDER = Path(__file__).parent / "src" / "regraft" / "serve" / "grpc"


def main(out: Path = FOLDER / "inference.binpb") -> int:
    """Compiles; returns protoc's exit code."""
    words = ["protoc", f"-I{FOLDER}", f"--descriptor_set_out={out}", "inference.proto"]
    code: int = protoc.main(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
