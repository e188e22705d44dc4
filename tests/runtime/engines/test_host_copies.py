from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support import fake_onnxruntime, fake_tensorrt

from regraft.engines import EngineOptions, host_copies, open_engine
from regraft.engines.cuda_runtime import Cuda
from regraft.engines.host_copies import MOST_THREADS, SHARE, HostCopies
from regraft.engines.tensorrt.runner import Runner


def drawn(images: int, size: int) -> NDArray[np.float32]:
    return np.random.default_rng(images).normal(size=(images, size)).astype(np.float32)


@given(st.integers(1, 9), st.integers(1, 2 * MOST_THREADS), st.integers(0, 40))
def test_everything_is_copied_whatever_the_threads(threads: int, images: int, more: int) -> None:
    source = drawn(images, SHARE // 4 + more)
    target = np.full((images + 1, source.shape[1]), 7, np.float32)
    copies = HostCopies(threads)
    try:
        copies.copy(target[:images], source)
        np.testing.assert_array_equal(target[:images], source)
        assert (target[images:] == 7).all()
        np.testing.assert_array_equal(copies.copied(source), source)
    finally:
        copies.close()


@pytest.mark.parametrize(
    ("threads", "images", "pieces"),
    [
        (1, 8, [8]),
        (2, 8, [4, 4]),
        (3, 8, [2, 3, 3]),
        (64, 8, [2, 2, 2, 2]),
        (4, 3, [1, 1, 1]),
        (4, 1, [1]),
    ],
)
def test_large_ones_are_cut_between_images(
    threads: int, images: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = np.copyto, []

    def copyto(target: NDArray[np.float32], source: NDArray[np.float32]) -> None:
        seen.append(len(source))
        honest(target, source)

    monkeypatch.setattr(host_copies.np, "copyto", copyto)
    copies = HostCopies(threads)
    copies.copied(drawn(images, SHARE // 4))
    copies.close()
    assert sorted(seen) == pieces


def test_small_ones_start_no_thread() -> None:
    before = threading.active_count()
    copies = HostCopies(MOST_THREADS)
    copies.copied(drawn(8, SHARE // 64))
    assert threading.active_count() == before
    copies.copied(drawn(8, SHARE // 4))
    assert threading.active_count() > before
    for _ in range(2):
        copies.close()
    assert threading.active_count() == before


def test_copies_end_before_the_memory_is_freed(
    ort: fake_onnxruntime.Module, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fake_tensorrt.Engine(fake_tensorrt.Cudart())
    held: list[bool] = []
    honest = HostCopies.close

    def close(self: HostCopies) -> None:
        held.append(cudart.live > 0)
        honest(self)

    monkeypatch.setattr(HostCopies, "close", close)
    cudart = plan.cudart
    Runner(plan, fake_tensorrt.module({}), Cuda(cudart)).close()
    assert cudart.live == 0
    engine = open_engine(pristine_bundle / "model.onnx", "ort-cuda")
    cudart = ort.cudart
    engine.close()
    assert cudart.live == 0
    assert held == [True, True]


def test_what_fails_on_a_thread_is_not_lost() -> None:
    copies = HostCopies(2)
    source = drawn(8, SHARE // 4)
    with pytest.raises(ValueError, match="could not broadcast"):
        copies.copy(np.empty((6, SHARE // 4), np.float32), source)
    copies.close()


def test_an_interrupted_copy_leaves_no_thread_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = np.copyto

    def copyto(target: NDArray[np.float32], source: NDArray[np.float32]) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        if np.shares_memory(target, last):
            time.sleep(0.5)  # while the others are free for the next copy
        honest(target, source)

    copies = HostCopies(4)
    target = np.zeros((8, SHARE // 4), np.float32)
    last = target[-1]
    with monkeypatch.context() as patched:
        patched.setattr(host_copies.np, "copyto", copyto)
        with pytest.raises(KeyboardInterrupt):
            copies.copy(target, np.full_like(target, 1))
    copies.copy(target, np.full_like(target, 2))
    copies.close()
    assert (target == 2).all()


@pytest.mark.parametrize("engine", ["ort-cuda", "tensorrt"])
def test_engines_copy_by_as_many_threads_as_they_are_given(
    ort: fake_onnxruntime.Module,
    pristine_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
) -> None:
    given: list[int] = []
    honest = HostCopies.__init__

    def noted(self: HostCopies, threads: int) -> None:
        given.append(threads)
        honest(self, threads)

    monkeypatch.setattr(HostCopies, "__init__", noted)
    for threads in (1, 3):
        if engine == "ort-cuda":
            options = EngineOptions(threads=threads)
            open_engine(pristine_bundle / "model.onnx", engine, options=options).close()
        else:
            plan = fake_tensorrt.Engine(fake_tensorrt.Cudart())
            card = Cuda(plan.cudart)
            Runner(plan, fake_tensorrt.module({}), card, threads=threads).close()
    assert given == [1, 3]


def test_padding_is_zero_on_ort_cuda_whatever_ran_before(
    ort: fake_onnxruntime.Module, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[NDArray[np.float32]] = []
    honest = Cuda.copy_in

    def copy_in(self: Cuda, device: int, host: int, size: int, stream: object) -> None:
        pixels = (ctypes.c_float * (size // 4)).from_address(host)
        uploaded.append(np.array(pixels, np.float32))
        honest(self, device, host, size, stream)

    monkeypatch.setattr(Cuda, "copy_in", copy_in)
    with open_engine(pristine_bundle / "model.onnx", "ort-cuda") as engine:
        for count in (4, 4, 3):  # two slots, of which the first is filled anew
            engine.run(np.ones((count, 3, *engine.size), np.float32))
    full, last = uploaded[-2], uploaded[-1].reshape(4, -1)
    assert (full == 1).all()
    assert (last[:3] == 1).all()
    assert (last[3] == 0).all()
