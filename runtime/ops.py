"""Small array operations between the stages: resizing, cross-fading and conversion to displayable frames."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FloatArray = NDArray[np.float32]
Frames = NDArray[np.uint8]  # [F, H, W, 3], RGB


def resize_bilinear(x: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Resize the last two axes, [..., H, W] -> [..., *size], corner pixels aligned as in the reference."""
    height, width = size
    rows, columns = _linear_weights(x.shape[-2], height), _linear_weights(x.shape[-1], width)
    return np.matmul(np.matmul(rows, x), columns.T)


def _linear_weights(source: int, target: int) -> FloatArray:
    """[target, source] weights of linear interpolation: each source pixel is a hat function one pixel wide."""
    positions = np.linspace(0, source - 1, target)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(source))).astype(np.float32)


def cross_fade(first: FloatArray, last: FloatArray, frames: int) -> FloatArray:
    """Linear transition from `first` to `last`, both [B, C, H, W] -> [B, C, frames, H, W]; the ends are exact."""
    weight = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None]
    return first[:, :, None] * (1 - weight) + last[:, :, None] * weight


def clip_to_frames(clip: FloatArray) -> Frames:
    """[1, 3, F, H, W] near [-1, 1] -> uint8 [F, H, W, 3]. The reference truncates instead of rounding; so do we."""
    frames = np.empty((*clip.shape[2:], clip.shape[1]), np.uint8)
    for number in range(len(frames)):  # one at a time: copies of a long clip as float32 take gigabytes
        unit = np.clip(clip[0, :, number] * np.float32(0.5) + np.float32(0.5), 0, 1)
        frames[number] = (unit * np.float32(255)).astype(np.uint8).transpose(1, 2, 0)
    return frames


def resize_frames(frames: Frames, size: tuple[int, int]) -> Frames:
    """Bicubic resize of uint8 [F, H, W, 3] to `size` = (width, height), by Pillow as in the reference."""
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def frames_to_clip(frames: Frames) -> FloatArray:
    """uint8 [F, H, W, 3] -> float32 [F, 3, H, W] in [-1, 1]."""
    unit = np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    return np.float32(2) * unit - np.float32(1)


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio of two clips uint8 [F, H, W, 3], over all of them, dB; infinite for equal ones."""
    error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, dtype=np.float64)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
