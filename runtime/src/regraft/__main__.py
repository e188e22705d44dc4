"""``python -m regraft``: the same as the command ``regraft``."""

from __future__ import annotations

from regraft.cli.main import program

if __name__ == "__main__":
    program()
