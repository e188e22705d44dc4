"""Checkpoints: every form that is read, every damage that is refused, and the hash."""

from __future__ import annotations

import argparse
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from regraft.errors import ModelError
from regraft_export.sources.weights import (
    check_finite,
    load_weights,
    read_state_dict,
    weights_sha256,
)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(first=nn.Linear(3, 4), second=nn.Linear(4, 2)))


def prefixed(state: dict[str, Any]) -> dict[str, Any]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {"teacher": prefixed(s), "student": {}},
        lambda s: {"model": {"state_dict": prefixed(s)}},
        prefixed,
    ],
    ids=["plain", "state_dict", "model", "teacher, module.", "nested twice", "module."],
)
def test_forms_of_checkpoints(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    path, source, target = tmp_path / "w.pth", small(), small()
    nn.init.zeros_(target.first.weight)
    torch.save(wrap(source.state_dict()), path)
    load_weights(target, path)
    assert weights_sha256(target) == weights_sha256(source)


def test_safetensors(tmp_path: Path) -> None:
    path, source = tmp_path / "w.safetensors", small()
    save_file(source.state_dict(), path)
    loaded = read_state_dict(path)
    assert set(loaded) == set(source.state_dict())
    assert torch.equal(loaded["first.weight"], source.first.weight)


def test_keys_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    state = small().state_dict()
    del state["second.bias"]
    state["first.bias"] = torch.zeros(7)
    for letter in "abcde":
        state[letter] = torch.zeros(1)
    path = tmp_path / "w.pth"
    torch.save(state, path)
    with pytest.raises(ModelError) as caught:
        load_weights(small(), path)
    assert str(caught.value) == (
        f"{path}: the weights do not fit Sequential: 1 missing (second.bias); 5 unexpected "
        "(a, b, c, ...); 1 of another shape (first.bias [7] instead of [4]); expected the state "
        "dict of this very model"
    )


def test_conversion_is_tried_when_the_keys_do_not_fit(tmp_path: Path) -> None:
    path, source, target = tmp_path / "w.pth", small(), small()
    nn.init.zeros_(target.first.weight)
    torch.save({f"old.{k}": v for k, v in source.state_dict().items()}, path)
    load_weights(target, path, lambda state, module: {k[4:]: v for k, v in state.items()})
    assert weights_sha256(target) == weights_sha256(source)

    def stumbles(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
        raise KeyError("patch_embed")

    with pytest.raises(ModelError, match=r"4 missing .* 4 unexpected \(old\.first\.weight"):
        load_weights(target, path, stumbles)


class Custom:
    """A class that a pickle would have to import."""


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (Custom(), "Custom"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
    ids=["namespace", "own class", "whole module"],
)
def test_pickles_that_need_code_are_refused(tmp_path: Path, content: object, names: str) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": small().state_dict(), "extra": content}, path)
    with pytest.raises(ModelError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: this pickle needs code to be read (")
    assert names in message
    assert "save the state dict alone: torch.save(model.state_dict(), FILE)" in message
    assert "\n" not in message


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "touched",)

    path = tmp_path / "w.pth"
    torch.save({"a": Evil()}, path)
    with pytest.raises(ModelError, match="needs code"):
        read_state_dict(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kind", ["text", "empty", "truncated"])
def test_damaged_files_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    state = {"a": torch.arange(1000.0)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(
        {"text": b"hello\n", "empty": b"", "truncated": whole[: len(whole) // 2]}[kind]
    )
    with pytest.raises(ModelError, match=r"is not a (checkpoint|safetensors file)") as caught:
        read_state_dict(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_text_is_no_pickle_that_needs_code(tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    file.write_text('{"schema": 1}')
    with pytest.raises(ModelError, match=r"is not a checkpoint that torch\.load reads"):
        read_state_dict(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_state_dict(tmp_path / "none.pth")
    assert str(caught.value) == (
        f"{tmp_path / 'none.pth'}: no such weights file; expected safetensors or a torch.save file"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor; expected tensors by name"),
        ({}, "holds a dict; expected tensors by name"),
        ({"a": torch.ones(1), "epoch": 3}, "epoch are not tensors; expected a state dict"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(ModelError) as caught:
        read_state_dict(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    module = small()
    check_finite(module, "test")
    with torch.no_grad():
        module.second.weight[1, :2] = value
    with pytest.raises(ModelError) as caught:
        check_finite(module, "test")
    assert str(caught.value) == (
        "test: the weight second.weight has 2 NaN or infinite values of 8; expected finite weights"
    )


def test_hash_is_what_it_says() -> None:
    module = nn.Linear(2, 1)
    digest = hashlib.sha256()
    for name, shape in (("bias", "[1]"), ("weight", "[1, 2]")):
        tensor = getattr(module, name).detach()
        digest.update(f"{name}\0torch.float32\0{shape}\0".encode() + tensor.numpy().tobytes())
    assert weights_sha256(module) == digest.hexdigest()


def test_hash_tells_weights_apart_and_nothing_else() -> None:
    same, other = small(), small()
    assert weights_sha256(same) == weights_sha256(other)
    assert weights_sha256(small().half()) != weights_sha256(same)
    with torch.no_grad():
        other.second.bias[0] += 1e-7
    assert weights_sha256(other) != weights_sha256(same)
    # Transposed memory is the same tensor.
    strided = small()
    strided.first.weight = nn.Parameter(strided.first.weight.detach().t().contiguous().t())
    assert weights_sha256(strided) == weights_sha256(same)


def test_hash_of_scalars_empty_tensors_and_bfloat16() -> None:
    module = nn.Module()
    module.register_buffer("scalar", torch.tensor(3))
    module.register_buffer("empty", torch.zeros(0, 4))
    module.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16))
    first = weights_sha256(module)
    module.scalar += 1
    assert weights_sha256(module) != first
