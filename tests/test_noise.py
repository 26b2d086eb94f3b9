"""The noise stream against torch's generator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import SettingsError
from runtime.noise import NoiseStream

TOLERANCE = 1e-6  # torch's own polynomials for log, cos and sin


def test_stream_gives_the_noise_that_the_reference_drew(golden: Path) -> None:
    reference = np.load(golden / "pipe_interp.npz")["init_noise"]
    noise = NoiseStream(345 + 9).normal(reference.shape)
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize("seed", [0, 345, 2**32 + 7, 2**64 - 1])
def test_consecutive_draws_of_all_sizes_equal_torch(seed: int) -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    stream = NoiseStream(seed)
    for shape in [(16,), (17,), (31,), (32,), (2, 3, 5, 7), (1, 3, 8, 40, 64), (12345,)]:
        reference = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(stream.normal(shape), reference, rtol=0, atol=TOLERANCE, err_msg=str(shape))


def test_only_the_last_sixteen_values_depend_on_a_count_that_is_no_multiple_of_sixteen() -> None:
    ragged, whole = NoiseStream(1).normal((40,)), NoiseStream(1).normal((48,))
    np.testing.assert_array_equal(ragged[:24], whole[:24])
    assert not np.any(ragged[24:] == whole[24:40])


def test_seeds_differ_in_their_low_32_bits_only() -> None:
    np.testing.assert_array_equal(NoiseStream(5).normal((64,)), NoiseStream(5 + 2**32).normal((64,)))
    assert not np.any(NoiseStream(5).normal((64,)) == NoiseStream(6).normal((64,)))


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, np.uint64])
def test_a_seed_of_numpy_is_the_number_that_it_is(kind: type[np.integer]) -> None:
    np.testing.assert_array_equal(NoiseStream(kind(5)).normal((64,)), NoiseStream(5).normal((64,)))  # type: ignore[arg-type]


def test_small_draws_are_refused_because_torch_makes_them_differently() -> None:
    with pytest.raises(ValueError, match="15 elements; torch draws fewer than 16 by another algorithm"):
        NoiseStream(0).normal((3, 5))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "x"])
def test_seeds_outside_64_bits_are_refused(seed: Any) -> None:
    with pytest.raises(SettingsError, match=rf"seed is {seed}; allowed: 0 to 18446744073709551615"):
        NoiseStream(seed)
