"""Redirects register neurons in an ONNX file that somebody else exported; PyTorch is not needed.

Blocks, token entry and outputs are found by the graph's structure. The result has the file's inputs
and outputs, name for name and shape for shape, its metadata and its weights but those touched; it
keeps external data if the file has it, as OUT.onnx.data.

With --check the patched graph is held to the method, written in numpy on the unpatched file's own
pieces, on pictures; a graph that is not equal is not written. It needs onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.options import file_name
from regraft.errors import InputError, UsageError
from regraft.wording import counted
from regraft_export.commands import _check_arguments
from regraft_export.commands._model_arguments import image_size
from regraft_export.commands._redirect_arguments import add_redirect_arguments, redirect_options

if TYPE_CHECKING:
    from regraft_export.foreign.check.checked import Checked
    from regraft_export.foreign.patching import Patched
    from regraft_export.foreign.survey import Survey


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", metavar="IN.onnx", type=Path, help="as an exporter wrote it")
    parser.add_argument("--neurons", required=True, metavar="FILE", help="neurons.json")
    parser.add_argument(
        "--out", type=file_name(".onnx"), metavar="OUT.onnx", help="the file to write"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be touched and write nothing"
    )
    parser.add_argument(
        "--prefix",
        metavar="NAME",
        help="which stack of blocks, where the file has several: how the names of its nodes or "
        "weights begin, or the name of its input",
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="N",
        help="one number, or height,width, where the file leaves it open and nothing in it says",
    )
    add_redirect_arguments(parser)
    _check_arguments.add_check_arguments(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace OUT.onnx if it exists; patch although the neurons belong elsewhere",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="list every mended token count, as --dry-run does"
    )
    parser.add_argument("--json", action="store_true", help="print the sites for machines")


def run(args: argparse.Namespace) -> int:
    """Patches, checks if asked to, and prints what was touched."""
    from regraft.files import check_output
    from regraft.neurons import Neurons
    from regraft_export.foreign.belongs import check_belongs
    from regraft_export.foreign.patching import patch
    from regraft_export.foreign.survey import survey
    from regraft_export.onnx_file.read import read_file
    from regraft_export.onnx_file.write import data_path, write_file

    if args.out is None and not args.dry_run:
        raise UsageError("--out is missing; expected the file to write, or --dry-run")
    if not args.dry_run:
        check_output(args.out, args.force)
    options = redirect_options(args)
    _check_arguments.refuse_alone(args)
    neurons = Neurons.load(args.neurons)
    file = read_file(args.model)
    if not args.dry_run:
        outputs = [Path(args.out)]
        if file.external:
            outputs.append(data_path(outputs[0]))
            check_output(outputs[-1], args.force)
        stored = {tensor.path for tensor in file.stored.values()}
        _spare_inputs(outputs, {args.model, Path(args.neurons), *stored})
    found = survey(file, prefix=args.prefix, image_size=args.image_size)
    for warning in check_belongs(neurons, found, args.force):
        print(f"regraft: warning: {warning}", file=sys.stderr)
    facts = _facts(found)
    # What stands in its way is said before the work.
    images = None if args.check is None else _check_arguments.images(args, neurons, found)
    patched = patch(found, neurons, options)
    facts |= _sites(patched)
    checked = None
    if images is not None:
        checked = _check_arguments.check(args, file, patched, neurons, options, images)
        facts |= {"check": checked.to_json()}
    written: list[Path] = []
    if not args.dry_run and (checked is None or checked.passed):
        out = Path(args.out)
        written = write_file(
            patched.proto, patched.stored, out, external=file.external, force=args.force
        )
    facts |= {"written": [str(path) for path in written]}
    said = _lines(args.model, facts, checked, every=args.verbose or args.dry_run)
    print(json.dumps(facts, indent=1, allow_nan=False) if args.json else "\n".join(said))
    sys.stdout.flush()
    if checked is not None:
        checked.gate(options)
    return 0


def _spare_inputs(written: Iterable[Path], read: Iterable[Path]) -> None:
    """Not even ``--force`` writes over what is being read: nothing could be patched from it again.

    Raises:
        InputError: a file is both.
    """
    inputs = {path.resolve() for path in read}
    for path in written:
        if path.resolve() in inputs:
            raise InputError(f"{path}: would be written over, and is read; give another --out")


def _facts(found: Survey) -> dict[str, Any]:
    entry, image = found.entry, found.image
    return {
        "blocks": found.stack.depth,
        "width": found.stack.mlps[0].width,
        "hidden": found.stack.mlps[0].hidden,
        "precision": found.precision,
        "opset": found.file.opset,
        "input": image.name,
        "image_size": list(image.size),
        "open_size": image.open_size,
        "tokens": entry.count,
        "prefix": entry.prefix,
        "grid": None if entry.grid is None else list(entry.grid),
        "attentions": [n.name for n in found.attentions],
    }


def _sites(patched: Patched) -> dict[str, Any]:
    return {
        "token": patched.token,
        "redirects": {str(layer): name for layer, name in patched.redirects.items()},
        "outputs": list(patched.exits),
        "mended": list(patched.sites.mended),
        "nodes_added": {str(layer): n for layer, n in patched.nodes_added.items()},
    }


def _lines(
    model: Path, facts: dict[str, Any], checked: Checked | None, *, every: bool
) -> Iterator[str]:
    size = "any image size" if facts["open_size"] else "x".join(map(str, facts["image_size"]))
    grid = facts["grid"]
    tokens = f"{facts['tokens']} tokens"
    if grid is not None:
        tokens += f" ({facts['prefix']} prefix, {grid[0]} x {grid[1]} patches)"
    yield (
        f"{model}: {facts['blocks']} blocks of width {facts['width']} ({facts['hidden']} neurons), "
        f"{len(facts['attentions'])} attentions, {tokens}, input {facts['input']!r} at {size}, "
        f"{facts['precision']}, opset {facts['opset']}"
    )
    yield f"token site: {facts['token']}"
    for layer, name in facts["redirects"].items():
        nodes = counted(facts["nodes_added"][layer], "node")
        yield f"redirect site: layer {layer}, {name} ({nodes})"
    for name in facts["outputs"]:
        yield f"output site: {name}"
    for line in facts["mended"] if every else _by_kind(facts["mended"]):
        yield f"mended: {line}"
    if checked is not None:
        yield from _check_arguments.lines(checked)
    yield f"written: {', '.join(facts['written'])}" if facts["written"] else "nothing was written"


def _by_kind(mended: list[str]) -> list[str]:
    """How many token counts changed in the same way, in place of every node's name."""
    kinds = Counter(line.rpartition(": ")[2] for line in mended)
    return [f"{kind}, in {counted(n, 'place')} (--verbose lists them)" for kind, n in kinds.items()]
