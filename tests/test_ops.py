"""Array operations between the stages against the reference and torch."""

from pathlib import Path

import numpy as np
import pytest

from runtime.ops import clip_to_frames, cross_fade, frames_to_clip, resize_bilinear, resize_frames


@pytest.mark.torch
@pytest.mark.parametrize(
    ("source", "target"), [((8, 12), (32, 48)), ((5, 7), (3, 4)), ((1, 6), (4, 1)), ((6, 1), (1, 5)), ((4, 4), (4, 4))]
)
def test_bilinear_resize_equals_torch(source: tuple[int, int], target: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 3, 4, *source), dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x.reshape(6, 4, *source)), size=target, mode="bilinear", align_corners=True
    )
    resized = resize_bilinear(x, target)
    assert resized.dtype == np.float32
    # torch rounds the positions between pixels to float32.
    np.testing.assert_allclose(resized, expected.numpy().reshape(2, 3, 4, *target), rtol=0, atol=5e-6)


def test_bilinear_resize_keeps_the_corner_pixels() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 12), dtype=np.float32)
    np.testing.assert_array_equal(resize_bilinear(x, (32, 48))[..., [0, -1]][..., [0, -1], :], x[..., ::7, ::11])


@pytest.mark.torch
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_cross_fade_equals_trilinear_resize_in_torch(frames: int) -> None:
    torch = pytest.importorskip("torch")
    first, last = np.random.default_rng(0).standard_normal((2, 2, 3, 4, 6), dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(np.stack([first, last], axis=2)), size=(frames, 4, 6), mode="trilinear", align_corners=True
    )
    np.testing.assert_allclose(cross_fade(first, last, frames), expected.numpy(), rtol=0, atol=1e-6)


def test_cross_fade_starts_and_ends_with_its_inputs() -> None:
    first, last = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 6), dtype=np.float32)
    faded = cross_fade(first, last, 5)
    assert faded.shape == (1, 3, 5, 4, 6) and faded.dtype == np.float32
    np.testing.assert_array_equal(faded[:, :, 0], first)
    np.testing.assert_array_equal(faded[:, :, -1], last)


@pytest.mark.parametrize(("file", "clip"), [("pipe_base", "frames"), ("pipe_sr2", "video")])
def test_frames_for_display_equal_the_reference(golden: Path, file: str, clip: str) -> None:
    reference = np.load(golden / f"{file}.npz")
    np.testing.assert_array_equal(clip_to_frames(reference[clip]), reference["uint8"])


def test_frames_for_display_are_truncated_and_clamped() -> None:
    clip = np.array([-5, -1, 0, 0.999, 1, 5], np.float32).reshape(1, 1, 6, 1, 1)
    before = clip.copy()
    assert clip_to_frames(clip).ravel().tolist() == [0, 0, 127, 254, 255, 255]
    np.testing.assert_array_equal(clip, before)


def test_resized_frames_equal_the_reference(golden: Path) -> None:
    reference = np.load(golden / "pipe_sr2.npz")
    np.testing.assert_array_equal(resize_frames(reference["frames_in"], (48, 32)), reference["frames_resized"])


def test_frames_between_the_super_resolution_stages_equal_the_reference(golden: Path) -> None:
    reference = np.load(golden / "cascade.npz")
    frames = resize_frames(clip_to_frames(reference["sr1"]), (112, 64))
    np.testing.assert_array_equal(frames, reference["sr2_input_uint8"])


def test_frames_become_a_clip_between_minus_one_and_one() -> None:
    frames = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    clip = frames_to_clip(frames)
    assert clip.shape == (1, 3, 1, 1) and clip.dtype == np.float32
    np.testing.assert_allclose(clip.ravel(), [-1, -0.6, 1], rtol=0, atol=1e-7)
