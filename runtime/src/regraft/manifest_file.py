"""``manifest.json`` as a file: schema and sha256, which are looked at before its content.

A schema newer than :data:`SCHEMA` is refused, an older one is read. The file carries a sha256 of
its own content, so that a changed one is noticed like any other file of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft import json_values
from regraft.errors import BundleError

SCHEMA = 2  # 1 has no variants: all bundles are `token`
_MEND = "copy the bundle again or export again"


def digest(content: Mapping[str, Any]) -> str:
    """The sha256 (hex) that a manifest of this content carries.

    Args:
        content: as :meth:`regraft.manifest.Manifest.to_json` gives it; its field ``sha256`` does
            not count.
    """
    return json_values.digest({name: value for name, value in content.items() if name != "sha256"})


def read_content(path: Path) -> dict[str, Any]:
    """The content of a manifest file, as it was written; its fields are not looked at.

    Raises:
        BundleError: it is missing, not JSON, of no schema this version reads, or changed.
    """
    missing = "expected the folder that `regraft export` wrote"
    data = json_values.read_json(path, BundleError, missing=missing, broken=_MEND)
    content = expect_schema(data, str(path))  # first: a newer one may seal its content otherwise
    if "sha256" not in content:
        raise BundleError(f"{path}: the field 'sha256' is missing; {_MEND}")
    if content["sha256"] != digest(content):
        raise BundleError(f"{path}: was changed after export; {_MEND}")
    return content


def expect_schema(data: Any, origin: str) -> dict[str, Any]:
    """Returns a manifest's content as it came, once its schema is one that this version reads.

    Raises:
        BundleError: it is not a manifest, or of a newer schema.
    """
    if not isinstance(data, dict) or "schema" not in data:
        raise BundleError(f'{origin}: is not a manifest; expected a JSON object with "schema"')
    schema = data["schema"]
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise BundleError(f"{origin}: schema is {schema!r}; expected an integer from 1 on")
    if schema > SCHEMA:
        raise BundleError(
            f"{origin}: schema {schema} is newer than {SCHEMA}, the newest this "
            "version reads; upgrade regraft-runtime"
        )
    return data
