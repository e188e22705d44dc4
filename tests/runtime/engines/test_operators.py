"""regraft's own CUDA operators: compiled by `build`, kept with its verdict, loaded from there.

Their kernels run in `make test-gpu`; whether ONNX Runtime takes the library is tested here.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from numpy.typing import NDArray
from tests.support import fake_onnxruntime

from regraft.engines import EngineOptions, cache_key, open_engine
from regraft.engines.ort_cuda.engine import OrtCudaEngine
from regraft.engines.ort_cuda.operators import (
    LIBRARY,
    PRODUCTS,
    SUFFIX,
    compile_library,
    find_nvcc,
    source_sha256,
    timed_products,
)
from regraft.engines.ort_cuda.runner import SIZES
from regraft.errors import EngineError

Fake = fake_onnxruntime.Module
Compiler = Callable[[str], Path]


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """``nvcc(script)``: a compiler that does this; ``$out`` is the library."""

    def make(script: str) -> Path:
        file = tmp_path / "nvcc"
        head = (
            '#!/bin/sh\nfor word; do case "$last" in -o) out="$word";; esac; last="$word"; done\n'
        )
        file.write_text(f"{head}{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("NVCC", str(file))
        return file

    return make


def library(folder: Path, saved: str = "fputs(text, file)", mode: str = "w") -> str:
    """What a compiler does that writes a library like regraft's, but for its operators."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    source = folder / "library.c"
    source.write_text(
        f"""#include <stdio.h>
        static const char* text = "never timed";
        void regraft_tune(int on) {{ text = on ? "still timed" : "timed, then no more"; }}
        int regraft_save(const char* path) {{
          FILE* file = fopen(path, "{mode}");
          const int status = {saved};
          fclose(file);
          return status < 0 ? -1 : 1;
        }}"""
    )
    return f'cc -shared -fPIC {source} -o "$out"'


@pytest.fixture
def graph(pristine_bundle: Path) -> Path:
    """A graph that says that it needs the operators, beside its weights."""
    file = pristine_bundle / f"model{SUFFIX}"
    shutil.copy(pristine_bundle / "model.onnx", file)
    return file


def test_a_graph_with_operators_has_to_be_built(ort: Fake, graph: Path) -> None:
    with pytest.raises(EngineError, match=r"was not built in fp32.*regraft build"):
        open_engine(graph, "ort-cuda")
    with pytest.raises(EngineError, match=r"not compiled; run: regraft build"):
        OrtCudaEngine(graph, "fp32", EngineOptions())
    assert ort.cudart.live == 0


def test_a_build_compiles_them_and_they_are_loaded_from_it(
    ort: Fake, graph: Path, nvcc: Compiler, tmp_path: Path
) -> None:
    nvcc(f'[ -z "$out" ] && echo release 13 && exit; {library(tmp_path)}; echo "$@" > "$0.words"')
    steps: list[str] = []
    folder = tmp_path / "entry"
    folder.mkdir()
    report = OrtCudaEngine.build(graph, "fp32", {}, folder, lambda what, *_: steps.append(what))
    assert report["operators"] == {"sources": source_sha256(), "nvcc": "release 13"}
    assert list(dict.fromkeys(steps)) == [
        *("compiling CUDA operators", "timing products", f"warming {graph.name}")
    ]
    # Products are timed for every batch that is executed, outside of recordings.
    assert [session.provider["enable_cuda_graph"] for session in ort.sessions] == ["0", "1"]
    assert len(ort.sessions[0].runs) == 2 * len(SIZES)  # prepared, and run
    assert (folder / PRODUCTS).read_text() == "timed, then no more"
    words = (tmp_path / "nvcc.words").read_text().split()
    source = next(Path(word) for word in words if word.endswith(".cu"))
    assert source.exists()
    assert "arch=compute_90,code=[sm_90,compute_90]" in words
    with open_engine(graph, "ort-cuda", built=folder) as engine:
        assert engine.outputs
    assert [s.settings.libraries for s in ort.sessions] == [(str(folder / LIBRARY),)] * 3
    (folder / LIBRARY).write_bytes(b"")
    with pytest.raises(EngineError, match="Failed to load library"):
        open_engine(graph, "ort-cuda", built=folder)


def test_what_one_graph_was_timed_for_serves_the_next(
    ort: Fake, graph: Path, nvcc: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A library that adds to what it finds.
    nvcc(f'[ -z "$out" ] && exit; {library(tmp_path, mode="a")}')
    for name, times in (("model", 1), ("baseline", 2)):
        folder = tmp_path / name
        folder.mkdir()
        OrtCudaEngine.build(graph, "fp32", {}, folder, lambda *_: None)
        assert (folder / PRODUCTS).read_text() == times * "timed, then no more"
    (tmp_path / "alone").mkdir()
    compile_library(tmp_path / "alone")
    with timed_products(tmp_path / "alone"):  # for no card
        assert not (tmp_path / "alone" / PRODUCTS).exists()
    monkeypatch.setattr(ort.cudart, "cudaDriverGetVersion", lambda: 13020)
    (tmp_path / "other").mkdir()
    OrtCudaEngine.build(graph, "fp32", {}, tmp_path / "other", lambda *_: None)
    assert (tmp_path / "other" / PRODUCTS).read_text() == "timed, then no more"


def test_products_that_do_not_fit_the_card_are_not_timed(
    ort: Fake,
    graph: Path,
    nvcc: Compiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nvcc(f'[ -z "$out" ] && exit; {library(tmp_path)}')
    run, least = OrtCudaEngine.run, 4

    def full(self: OrtCudaEngine, pixels: NDArray[np.float32]) -> Mapping[str, object]:
        if len(pixels) >= least:
            raise EngineError("ort-cuda: out of memory")
        return run(self, pixels)

    monkeypatch.setattr(OrtCudaEngine, "run", full)
    with caplog.at_level(logging.WARNING, "regraft"):
        OrtCudaEngine.build(graph, "fp32", {}, tmp_path, lambda what, *_: None)
    assert "too little free memory for batches of 4; their products are not timed" in caplog.text
    assert (tmp_path / PRODUCTS).exists()
    least = 1
    with pytest.raises(EngineError, match="out of memory"):
        OrtCudaEngine.build(graph, "fp32", {}, tmp_path, lambda what, *_: None)


def test_what_was_chosen_has_to_be_kept(
    ort: Fake, graph: Path, nvcc: Compiler, tmp_path: Path
) -> None:
    nvcc(f'[ -z "$out" ] && exit; {library(tmp_path, saved="-1")}')
    with pytest.raises(EngineError, match=rf"{PRODUCTS} cannot be written; is the disk full"):
        OrtCudaEngine.build(graph, "fp32", {}, tmp_path, lambda what, *_: None)


def test_a_library_that_cannot_be_loaded_says_so(
    ort: Fake, graph: Path, nvcc: Compiler, tmp_path: Path
) -> None:
    nvcc('[ -z "$out" ] && exit; echo no library > "$out"')
    with pytest.raises(EngineError, match="the compiled operators cannot be loaded"):
        OrtCudaEngine.build(graph, "fp32", {}, tmp_path, lambda what, *_: None)


def test_the_same_is_compiled_once_for_all_graphs(
    nvcc: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = nvcc('[ -z "$out" ] && echo release 13 && exit; echo again >> "$0.runs"; date > "$out"')
    folders = [tmp_path / name for name in ("model", "baseline", "others", "elsewhere")]
    for folder in folders:
        folder.mkdir()
    first = compile_library(folders[0])
    content = (folders[0] / LIBRARY).read_bytes()
    shutil.rmtree(folders[0])  # a build that missed a limit
    assert compile_library(folders[1]) == first
    assert (folders[1] / LIBRARY).read_bytes() == content
    runs = own.with_name("nvcc.runs")
    assert runs.read_text() == "again\n"
    # Other sources or another compiler give another library.
    monkeypatch.setattr("regraft.engines.ort_cuda.operators.source_sha256", lambda: "0" * 64)
    assert compile_library(folders[2])["sources"] == "0" * 64
    assert runs.read_text() == "again\n" * 2
    monkeypatch.setenv("NVCC", str(own.rename(tmp_path / "other")))
    compile_library(folders[3])
    assert own.with_name("other.runs").read_text() == "again\n"


def test_what_failed_is_compiled_again(nvcc: Compiler, tmp_path: Path) -> None:
    nvcc("exit 3")
    with pytest.raises(EngineError, match="failed to compile"):
        compile_library(tmp_path)
    assert not (tmp_path / LIBRARY).exists()
    nvcc('[ -z "$out" ] && exit; echo library > "$out"')
    assert compile_library(tmp_path)["nvcc"] == ""
    assert (tmp_path / LIBRARY).read_text() == "library\n"


def test_other_sources_are_another_entry_of_the_cache(
    ort: Fake, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> list[str]:
        files = (graph, graph.with_name("model.onnx"))
        return [str(cache_key(OrtCudaEngine, file, "fp32").folder) for file in files]

    before = keys()
    monkeypatch.setattr("regraft.engines.ort_cuda.engine.source_sha256", lambda: "0" * 64)
    own, plain = keys()
    assert own != before[0]
    assert plain == before[1]


def test_another_cublas_is_another_entry_of_the_cache(
    ort: Fake, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    sources = f", operators {source_sha256()[:16]}"
    assert OrtCudaEngine.toolchain(graph) == sources  # the CUDA toolkit's own
    installed["nvidia-cublas"] = "13.1.0.3"
    assert OrtCudaEngine.toolchain(graph) == f"{sources}, nvidia-cublas 13.1.0.3"
    plain = graph.with_name("model.onnx")
    before = [cache_key(OrtCudaEngine, file, "fp32").folder for file in (graph, plain)]
    installed["nvidia-cublas"] = "13.2.0.9"
    own, other = (cache_key(OrtCudaEngine, file, "fp32").folder for file in (graph, plain))
    assert own != before[0]
    assert other == before[1]
    installed["nvidia-cublas-cu12"] = "12.9.1.4"
    assert cache_key(OrtCudaEngine, graph, "fp32").folder != own


def test_a_card_that_is_too_old_is_refused(
    ort: Fake, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.engines.ort_cuda.engine.LEAST_CAPABILITY", 999)
    with pytest.raises(EngineError, match=r"compute capability 999 .*, this one has \d+; export"):
        OrtCudaEngine.build(graph, "fp32", {}, tmp_path, lambda what, *_: None)


def test_auto_says_that_it_passes_over_what_is_not_built(
    ort: Fake, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = graph.with_name("model.onnx")
    with (
        caplog.at_level(logging.WARNING, "regraft"),
        open_engine(plain, "auto", variants={"cuda": graph}) as engine,
    ):
        assert engine.name == "ort-cpu"
    assert "auto: ort-cuda could run here, but model.onnx is not built; runs ort-cpu" in caplog.text


def test_other_graphs_need_no_library(ort: Fake, graph: Path) -> None:
    with open_engine(graph.with_name("model.onnx"), "ort-cuda"):
        assert ort.sessions[0].settings.libraries == ()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            """echo 'redirect.cuh(3): error: no such thing' >&2; echo >&2
            echo '1 error detected in the compilation of "operators.cu".' >&2; exit 1""",
            "error: no such thing",
        ),
        ("exit 3", "it says nothing"),
        ("exit 0", "it says nothing"),  # and wrote nothing
    ],
)
def test_what_the_compiler_says_is_passed_on(
    nvcc: Compiler, tmp_path: Path, script: str, said: str
) -> None:
    nvcc(script)
    with pytest.raises(EngineError, match=f"failed to compile the CUDA operators: .*{said}"):
        compile_library(tmp_path)


def test_without_a_compiler_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NVCC", str(tmp_path / "nowhere"))
    with pytest.raises(EngineError, match=r"nowhere cannot be run \(No such file"):
        compile_library(tmp_path)
    monkeypatch.setattr("regraft.engines.ort_cuda.operators.find_nvcc", lambda: None)
    with pytest.raises(EngineError, match=r"no nvcc.*set NVCC.*without --cuda-operators"):
        compile_library(tmp_path)


def test_nvcc_is_looked_for_where_cuda_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "bin").mkdir()
    own = tmp_path / "bin" / "nvcc"
    own.write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() == str(own)


@pytest.mark.slow
def test_onnxruntime_takes_the_library(tmp_path: Path) -> None:
    if find_nvcc() is None:
        pytest.skip("no nvcc here")
    folder = tmp_path / "with, a comma"
    folder.mkdir()
    compile_library(folder)
    for kind, numbers in (("float", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")):
        proto = onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 20, "regraft" : 1]>
            g ({kind}[b, 5, 16] h, {kind}[b, 5, 4] r, int64[2] n, {kind}[2] s, {kind}[2, 4] d,
               {kind}[4] row, {kind}[16] c, {kind}[16, 4] w)
            => ({kind}[b, 5, 4] y, {kind}[b, 5, 8] z, {kind}[b, 5, 16] o, {kind}[b, 5, 4] v) {{
              t = regraft.AddRedirected_{numbers} (h, r, n, s, d)
              y = regraft.AddRow_{numbers} (t, row)
              z = regraft.BiasedSwiGlu_{numbers} (h, c)
              g = regraft.BiasedGelu_{numbers} (h, c)
              q = regraft.BiasedQuickGelu_{numbers} (h, c)
              g1, r1 = regraft.BiasedGeluRedirected_{numbers} (h, c, r, n, s, d)
              g2, r2 = regraft.BiasedQuickGeluRedirected_{numbers} (h, c, r, n, s, d)
              g3, r3 = regraft.BiasedSwiGluRedirected_{numbers} (h, c, r, n, s, d)
              g4, r4 = regraft.BiasedGeluRow_{numbers} (h, c, r, row)
              g5, r5 = regraft.BiasedQuickGeluRow_{numbers} (h, c, r, row)
              g6, r6 = regraft.BiasedSwiGluRow_{numbers} (h, c, r, row)
              o = Sum (q, g1, g2, g4, g5)
              k = regraft.Product_{numbers} (g, w) l = regraft.BiasedProduct_{numbers} (g, w, row)
              a, e, f = regraft.ThreeProducts1Biased_{numbers} (g, w, w, w, row)
              v = Sum (r1, r2, r3, r4, r5, r6, k, l, a, e, f) }}"""
        )
        settings = onnxruntime.SessionOptions()
        settings.register_custom_ops_library(str(folder / LIBRARY))
        # It knows the operators and their types, and that none is one of the CPU's.
        with pytest.raises(Exception, match="Could not find an implementation for AddRe"):
            onnxruntime.InferenceSession(
                proto.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )
