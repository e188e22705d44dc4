"""``python -m regraft``: the same as the command ``regraft``."""

from __future__ import annotations

import sys

from regraft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
