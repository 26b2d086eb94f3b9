"""The reference's random numbers: torch's CPU normal stream, reproduced with NumPy."""

from operator import index

import numpy as np
from numpy.typing import NDArray

from engines.errors import SettingsError

_BLOCK = 16  # torch transforms uniforms in blocks of 16: 8 radii, then 8 angles


class NoiseStream:
    """Standard normal draws equal to `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`.

    Consecutive draws continue one stream, as they do with one torch generator. Values agree with torch's float32
    within 1e-6: torch evaluates the logarithm and the sines with its own polynomials.
    """

    def __init__(self, seed: int) -> None:
        try:
            number = index(seed)  # Python's, also of NumPy's integers, which may be too short for the mask
        except TypeError:
            number = -1
        if not 0 <= number < 2**64:
            raise SettingsError(f"seed is {seed}; allowed: 0 to {2**64 - 1}.")
        # torch seeds its Mersenne Twister with the low 32 bits only.
        self._words = np.random.RandomState(number & 0xFFFFFFFF)

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Draw float32 of any shape with at least 16 elements, filled in C order."""
        count = int(np.prod(shape))
        if count < _BLOCK:
            raise ValueError(f"shape {shape} has {count} elements; torch draws fewer than 16 by another algorithm.")
        uniform = self._uniform(count)
        whole = count - count % _BLOCK
        out = np.empty(count, np.float32)
        out[:whole] = _box_muller(uniform[:whole])
        if whole < count:
            # torch redraws the last 16 values, overwriting a part of the last whole block.
            out[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return out.reshape(shape)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        """Float32 [count] in [0, 1): the low 24 bits of each 32-bit word."""
        words = self._words.randint(0, 2**32, size=count, dtype=np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Uniforms to normals, [n] -> [n] with n a multiple of 16 (Box & Muller 1958)."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * np.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
