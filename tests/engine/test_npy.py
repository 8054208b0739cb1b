"""The strict reader of .npy headers against numpy's, and the draws and buffers that batches are made with."""

from __future__ import annotations

import io
import itertools
import pickle

import numpy as np
import pytest
import torch

from longskip.engine.data import buffers
from longskip.engine.data.buffers import Buffers
from longskip.engine.data.draws import Draws, generator
from longskip.engine.data.npy import array_of, header_of
from longskip.errors import BadSampleError


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


SHAPES = [(), (0,), (1,), (7,), (4, 32, 32), (1, 77, 768), (3, 0, 2), tuple(range(1, 9)), (10**6,)]


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_headers_are_read_as_numpy_reads_them(version: tuple[int, int]) -> None:
    for shape, dtype in itertools.product(SHAPES, (np.float16, np.float32, np.uint8)):
        if np.prod(shape, dtype=np.int64) > 10**5:
            continue
        array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
        data = npy(array, version)
        header = header_of(data)
        assert (header.dtype, header.shape, header.size) == (array.dtype, array.shape, len(data))
        assert header.offset == len(data) - array.nbytes
        found = array_of(data)
        assert found.dtype == array.dtype and np.array_equal(found, array) and found.shape == array.shape
        assert header_of(data[: header.offset]) == header


def header(text: str, version: bytes = b"\1\0") -> bytes:
    width = 2 if version == b"\1\0" else 4
    return b"\x93NUMPY" + version + len(text).to_bytes(width, "little") + text.encode("latin1")


GOOD = "{'descr': '<f2', 'fortran_order': False, 'shape': (3, 4), }   \n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "feature_format"), (b"\x93NUMP", "feature_format"), (b"\x93NUMPY", "feature_format"),
     (header(GOOD, b"\3\0"), "feature_format"), (header(GOOD, b"\0\0"), "feature_format"),
     (header(GOOD)[:-5], "feature_format"), (b"\x93NUMPY\2\0\xff\xff\xff\xff" + b" " * 100, "feature_format"),
     (header(GOOD + " " * 5000), "feature_format"), (header(GOOD.replace("3", "-3")), "feature_format"),
     (header(GOOD.replace("(3, 4)", "__import__('os').getcwd()")), "feature_format"),
     (header(GOOD.replace("(3, 4)", "(3 + 1,)")), "feature_format"), (header(GOOD[:-1] + "x\n"), "feature_format"),
     (header(GOOD.replace("(3, 4)", f"({'9' * 30},)")), "feature_format"),
     (header(GOOD.replace("False", "True")), "feature_format"), (header(GOOD.replace("<f2", "|O")), "feature_dtype"),
     (header(GOOD.replace("<f2", ">f2")), "feature_dtype"), (header(GOOD.replace("<f2", "<f8")), "feature_dtype"),
     (header(GOOD.replace("'<f2'", "[('a', '<f2')]")), "feature_format")],
)  # fmt: skip
def test_anything_else_is_refused(data: bytes, reason: str) -> None:
    header_of(header(GOOD))
    with pytest.raises(BadSampleError) as caught:
        header_of(data)
    assert caught.value.reason == reason


def test_numbers_that_are_too_few_or_too_many_are_refused() -> None:
    data = npy(np.zeros((3, 4), np.float16))
    for wrong in (data[:-1], data + b"\0", header(GOOD.replace("3", str(10**17)))):
        with pytest.raises(BadSampleError, match="needs"):
            array_of(wrong)


def test_moved_generators_draw_what_fresh_ones_draw() -> None:
    """The same bits, whatever was drawn of the sample before: a buffered half of a word, or many blocks."""
    top = (1 << 64) - 1
    places = [(0, 0), (0, 1), (1, 0), (top, top), (3, 1 << 40), (0, 1)]
    for seed, purpose in ((0, "noise"), (7, "time"), (7, "noise")):
        draws = Draws(seed, purpose)
        for epoch, sample in places:
            for draw in (
                lambda rng: rng.standard_normal(4097, dtype=np.float32).tobytes(),
                lambda rng: [rng.standard_normal(), rng.random(), rng.random(3).tobytes()],
                lambda rng: rng.integers(0, 1 << 32, 3, dtype=np.uint32).tolist(),
                lambda rng: rng.integers(0, 1 << 64, 9, dtype=np.uint64).tolist(),
            ):
                assert draw(draws.of(epoch, sample)) == draw(generator(seed, epoch, sample, purpose))
    for wrong in ((-1, 0), (0, -1), (top + 1, 0), (0, top + 1)):
        with pytest.raises(ValueError, match="must lie in"):
            Draws(0, "noise").of(*wrong)


def test_memory_comes_back_when_the_last_tensor_is_gone() -> None:
    pool = Buffers()
    shape = (buffers.SMALLEST // 4 + 1,)
    tensor, array = pool.tensor(shape, np.float32)
    place = tensor.data_ptr()
    array[:] = 3.0
    assert tensor.sum().item() == 3.0 * shape[0]
    view, seen = tensor[5:9], tensor[:2].numpy()
    del tensor, array
    assert pool.tensor(shape, np.float32)[0].data_ptr() != place  # a view is still there
    del view
    assert pool.tensor(shape, np.float32)[0].data_ptr() != place  # numpy's view too
    del seen
    others = [pool.tensor(shape, dtype)[0] for dtype in (np.float32, np.int32, np.float32)]
    assert others[0].data_ptr() == place or others[1].data_ptr() == place or others[2].data_ptr() == place
    assert len({other.data_ptr() for other in others}) == 3
    assert others[1].dtype == torch.int32
    held = [pool.tensor(shape, np.float32)[0] for _ in range(20)]
    del held, others
    assert sum(len(spare) for spare in pool._spare.values()) <= buffers.SPARE
    assert pickle.loads(pickle.dumps(pool))._spare == {}
    small, _ = pool.tensor((3,), bool)
    assert small.dtype == torch.bool and small.shape == (3,)
