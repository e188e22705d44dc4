"""Compiles the gRPC side's messages: each .proto file to a .binpb beside it.

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


def main(out: Path = FOLDER) -> int:
    """Compiles into a folder; returns protoc's first exit code that is not 0."""
    for source in sorted(FOLDER.glob("*.proto")):
        compiled = out / f"{source.stem}.binpb"
        code: int = protoc.main(
            ["protoc", f"-I{FOLDER}", f"--descriptor_set_out={compiled}", source.name]
        )
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
