from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regraft import Extractor
from regraft.bundle import Bundle
from regraft.engines import Engine, EngineOptions
from regraft.errors import BundleError, EngineError, ImageError, InputError
from regraft.features import Features


@pytest.fixture
def extractor(pristine_bundle: Path) -> Iterator[Extractor]:
    with Extractor.open(pristine_bundle, batch_size=4) as opened:
        yield opened


def assert_equal(got: Features, expected: Features) -> None:
    assert got.arrays().keys() == expected.arrays().keys()
    assert got.arrays()
    for name, array in expected.arrays().items():
        np.testing.assert_allclose(got.arrays()[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_shapes_and_types(extractor: Extractor, photos: list[Path]) -> None:
    features = extractor.extract(photos)
    assert {name: array.shape for name, array in features.arrays().items()} == {
        "cls": (11, 8),
        "patches": (11, 4, 4, 8),
        "pooled": (11, 8),
        "hidden.1": (11, 17, 8),
        "attention.1": (11, 2, 4, 4),
        "test_time_registers": (11, 1, 8),
    }
    assert all(array.dtype == np.float32 for array in features.arrays().values())
    assert features.prefix is None
    assert features.indices.tolist() == list(range(11))
    assert (extractor.engine, extractor.batch_size) == ("ort-cpu", 4)


def test_a_batch_equals_the_singles(extractor: Extractor, photos: list[Path]) -> None:
    singles = [extractor.extract([photo]) for photo in photos]
    assert_equal(extractor.extract(photos), Features.concatenate(singles))
    # Otherwise the comparison above says nothing of the order.
    assert np.ptp([single.cls for single in singles], axis=0).min() > 0.01


def test_every_form_of_an_image_gives_the_same(extractor: Extractor, photos: list[Path]) -> None:
    photos = photos[:3]
    expected = extractor.extract(photos)
    pictures = [Image.open(photo).convert("RGB") for photo in photos]
    arrays = [np.asarray(picture) for picture in pictures]
    preprocessing = extractor.bundle.manifest.preprocessing
    pixels = np.stack([preprocessing(picture) for picture in pictures])
    forms = {
        "words": [str(photo) for photo in photos],
        "bytes": [photo.read_bytes() for photo in photos],
        "pictures": pictures,
        "arrays": arrays,
        "mixed": [photos[0], pictures[1], arrays[2]],
        "generator": (photo for photo in photos),
        "pixels": pixels,
    }
    for form in forms.values():
        assert_equal(extractor.extract(form), expected)


def test_a_lone_path_may_be_streamed(extractor: Extractor, photos: list[Path]) -> None:
    for lone in (str(photos[0]), photos[0]):
        (features,) = extractor.stream(lone)
        assert features.indices.tolist() == [0]


def test_a_lone_image_is_a_batch_of_one(extractor: Extractor, photos: list[Path]) -> None:
    expected = extractor.extract(photos[:1])
    picture = Image.open(photos[0]).convert("RGB")
    for lone in (photos[0], str(photos[0]), picture, np.asarray(picture), photos[0].read_bytes()):
        assert_equal(extractor.extract(lone), expected)


def test_a_stack_of_arrays_is_a_list_of_images(extractor: Extractor) -> None:
    stack = np.random.default_rng(3).integers(0, 256, (3, 20, 24, 3), np.uint8)
    assert_equal(extractor.extract(stack), extractor.extract(list(stack)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images; expected at least one"),
        (np.zeros((0, 3, 16, 16), np.float32), "there are no images; expected at least one"),
        (7, "images: got int; expected paths, PIL images, uint8 arrays"),
        (np.zeros((2, 3, 8, 8), np.float32), r"got float32 of shape \(2, 3, 8, 8\); expected"),
        (np.zeros((2, 3, 16, 16)), "got float64 of shape"),
        (np.array(3, np.float32), "pixel_values: got a scalar; expected float32 of shape"),
        (["missing.jpg"], "missing.jpg: no such file"),
        ([np.zeros((4, 4), np.uint8)], r"an array of shape \(4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused(extractor: Extractor, images: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        extractor.extract(images)


def test_a_stream_keeps_the_order(extractor: Extractor, photos: list[Path]) -> None:
    many = photos * 5
    parts = list(extractor.stream(many))
    assert [len(part) for part in parts] == [4] * 13 + [3]
    assert np.concatenate([part.indices for part in parts]).tolist() == list(range(55))
    assert_equal(Features.concatenate(parts), extractor.extract(many))


def test_a_stream_leaves_out_what_cannot_be_read(
    extractor: Extractor, photos: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("not a picture")
    paths = [bad, *photos[:5], bad, photos[5]]
    failures = []
    parts = list(extractor.stream(paths, on_error=failures.append))
    assert [(failure.index, failure.path) for failure in failures] == [(0, str(bad)), (6, str(bad))]
    joined = Features.concatenate(parts)
    assert joined.indices.tolist() == [1, 2, 3, 4, 5, 7]
    assert_equal(joined, extractor.extract(photos[:6]))
    with pytest.raises(ImageError, match=r"bad\.jpg: is not an image file"):
        list(extractor.stream(paths))


def test_all_images_that_cannot_be_read_are_counted_and_the_first_ones_named(
    extractor: Extractor, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [tmp_path / f"bad-{i}.jpg" for i in range(5)]
    for path in bad:
        path.write_bytes(b"")
    ran: list[int] = []
    monkeypatch.setattr(extractor, "_start", lambda pixels, *rest: ran.append(len(pixels)))
    with pytest.raises(ImageError) as caught:
        extractor.extract([*bad[:2], *photos[:9]])
    named = [f"{path}: is empty (0 bytes)" for path in bad]
    assert str(caught.value) == f"2 of 11 images could not be read: {named[0]}; {named[1]}"
    assert ran == []  # what cannot be answered is not computed
    with pytest.raises(ImageError) as caught:
        extractor.extract(bad)
    first = "; ".join(named[:3])
    assert str(caught.value) == f"5 of 5 images could not be read: {first}; and 2 more"
    with pytest.raises(ImageError) as caught:
        extractor.extract(bad[:1])
    assert str(caught.value) == named[0]


def test_a_stream_reads_ahead_two_batches_at_most(extractor: Extractor, photos: list[Path]) -> None:
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield photos[taken % len(photos)]

    stream = extractor.stream(endless())
    for done in range(1, 6):
        next(stream)
        assert taken <= (done + 2) * extractor.batch_size
    stream.close()
    assert taken < 40


def test_a_stream_forgets_what_it_has_handed_out(extractor: Extractor, photos: list[Path]) -> None:
    alive = []
    for features in extractor.stream(photos):
        alive.append(weakref.ref(features.patches.base))
    del features
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


def test_a_stream_that_is_left_stops_its_threads(extractor: Extractor, photos: list[Path]) -> None:
    before = threading.active_count()
    for _ in extractor.stream(photos * 3):
        assert threading.active_count() > before
        break
    gc.collect()
    assert threading.active_count() == before


def test_a_stream_of_one_buffer_filled_anew(extractor: Extractor) -> None:
    frames = np.random.default_rng(5).integers(0, 256, (20, 40, 30, 3), np.uint8)

    def camera() -> Iterator[np.ndarray]:
        buffer = np.empty(frames.shape[1:], np.uint8)
        for frame in frames:
            buffer[:] = frame
            yield buffer

    got = Features.concatenate(list(extractor.stream(camera())))
    assert_equal(got, extractor.extract(list(frames)))


def test_only_wanted_outputs_are_computed(pristine_bundle: Path, photos: list[Path]) -> None:
    with Extractor.open(pristine_bundle, outputs=["pooled"]) as extractor:
        assert list(extractor.extract(photos[0]).arrays()) == ["pooled"]
    with pytest.raises(InputError, match="output 'prefix' is not in this bundle, which gives cls"):
        Extractor.open(pristine_bundle, outputs=["prefix"])


def test_threads_share_an_extractor(extractor: Extractor, photos: list[Path]) -> None:
    expected = [extractor.extract(photo) for photo in photos]
    results: dict[int, Features] = {}

    def work(i: int) -> None:
        results[i] = extractor.extract(photos[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(photos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, features in results.items():
        assert_equal(features, expected[i])
    assert len(results) == len(photos)


class FakeEngine(Engine):
    """Returns a given array for every output, so that tests need no real graph."""

    name = "fake"

    def __init__(self, bundle: Bundle, fill: float = 1.0, bad_row: int | None = None) -> None:
        self._fill, self._bad_row = fill, bad_row
        self._shapes = dict(bundle.manifest.outputs)
        super().__init__(bundle.graph("model"), "fp32", EngineOptions())

    @classmethod
    def unavailable(cls, precision: str) -> str | None:
        return None

    def _open(self, graph: Path, options: EngineOptions):
        return (16, 16), self._shapes

    def _run(self, pixels: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        arrays = [
            np.full((len(pixels), *self._shapes[name][1:]), self._fill, np.float32)
            for name in outputs
        ]
        if self._bad_row is not None:
            arrays[-1][self._bad_row] = np.nan
        return arrays


def test_an_engine_may_be_handed_in(pristine_bundle: Path, photos: list[Path]) -> None:
    bundle = Bundle.open(pristine_bundle)
    with Extractor.open(bundle, FakeEngine(bundle, 3.0)) as extractor:
        assert extractor.engine == "fake"
        assert extractor.extract(photos).pooled.tolist() == [[3.0] * 8] * 11
    with pytest.raises(EngineError, match="fake: is closed"):
        extractor.extract(photos)


def test_nan_is_reported_with_its_image(pristine_bundle: Path, photos: list[Path]) -> None:
    bundle = Bundle.open(pristine_bundle)
    with Extractor.open(bundle, FakeEngine(bundle, bad_row=2), outputs=["pooled"]) as extractor:
        with pytest.raises(EngineError) as caught:
            extractor.extract(photos)
        assert str(caught.value).startswith(
            f"fake: pooler_output holds NaN or Inf for {photos[2]}; in fp16 that is an overflow"
        )
        with pytest.raises(EngineError, match="NaN or Inf for image 2, counted from 0; in fp16"):
            extractor.run(np.zeros((4, 3, 16, 16), np.float32))
    inf = FakeEngine(bundle, fill=np.inf)
    with Extractor.open(bundle, inf) as extractor, pytest.raises(EngineError, match="NaN or Inf"):
        extractor.extract(photos[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_the_input_is_said_of_the_input(extractor: Extractor, value: float) -> None:
    pixels = np.zeros((7, 3, 16, 16), np.float32)
    pixels[5, 1, 2, 3] = value
    for ask in (extractor.run, extractor.extract):
        with pytest.raises(InputError) as caught:
            ask(pixels)
        assert str(caught.value) == (
            "pixel_values: NaN or Inf in image 5, counted from 0; expected finite numbers"
        )


@pytest.mark.parametrize("pixels", [None, 3, [1.0]], ids=str)
def test_a_run_of_no_array_is_refused(extractor: Extractor, pixels: object) -> None:
    name = type(pixels).__name__
    with pytest.raises(InputError, match=f"pixel_values: got {name}; expected float32 of shape"):
        extractor.run(pixels)


def test_a_graph_that_lacks_an_output_is_refused(pristine_bundle: Path) -> None:
    bundle = Bundle.open(pristine_bundle)
    engine = FakeEngine(bundle)
    engine.outputs = {"pooler_output": ("batch", 8)}
    with pytest.raises(
        BundleError, match=r"model\.onnx lacks the outputs attentions\.1, hidden\.1"
    ):
        Extractor.open(bundle, engine)


@pytest.mark.parametrize(
    ("option", "expected"), [("batch_size", "at least 1"), ("threads", "1 to 1024")]
)
def test_sizes_below_one_are_refused(pristine_bundle: Path, option: str, expected: str) -> None:
    with pytest.raises(InputError, match=f"{option} is 0; expected {expected}"):
        Extractor.open(pristine_bundle, **{option: 0})
