"""The whole path on the small ViT that ships with regraft: find, export, verify, bench, report.

It runs the commands that a user would type, prints each before it runs, and leaves what they wrote
in a folder. No network; about a minute on two cores. The ViT was trained for this and its register
neurons were planted: it shows the path, not how well the method does on your model.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import sys
import time
from pathlib import Path

from regraft.cli.options import add_force
from regraft.errors import GateError
from regraft.files import whole_folder

MODEL = "python:regraft_export.demo:shipped_vit"
STEPS = (
    f"find {MODEL} --images images --out neurons.json",
    f"export {MODEL} --neurons neurons.json --images images --out bundle",
    f"verify bundle --images images --model {MODEL}",
    "extract bundle images --out features.npz",
    "bench bundle --images images --seconds 4",
    "report bundle --images images --out report.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "--out", default="regraft-demo", metavar="DIR", help="default: regraft-demo"
    )
    add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Runs every step.

    Raises:
        GateError: a step failed; no folder appears.
    """
    from regraft_export.demo import sample_images_folder

    start = time.monotonic()
    with whole_folder(args.out, marker="report.html", force=args.force) as folder:
        shutil.copytree(sample_images_folder(), folder / "images")
        print(f"{len(list((folder / 'images').iterdir()))} sample pictures: images/", flush=True)
        for step in STEPS:
            _step(step, folder)
    print(
        f"\n{time.monotonic() - start:.0f} s in all. Everything is in {args.out}: open "
        f"{Path(args.out) / 'report.html'} in a browser."
    )
    return 0


def _step(step: str, folder: Path) -> None:
    from regraft.cli.main import INTERRUPTED, main

    print(f"\n$ regraft {step}", flush=True)
    with contextlib.chdir(folder):
        code = main(shlex.split(step))
    sys.stdout.flush()
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        # Raised, so that the folder does not appear half filled.
        raise GateError(f"the demo stopped at `regraft {step}` (its reason stands above)")
