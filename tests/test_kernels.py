"""The kernels against float64 and against the NumPy runtime, in up to three implementations of one meaning:

reference  the plain C++ of kernels/src/*_ref.cpp
on_cpu     the CUDA sources themselves, run by tests/cuda_on_cpu
gpu        the CUDA library on a GPU
"""

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_schedulers import PUBLISHED

from engines.errors import EngineError
from engines.gpu import Gpu
from export.kernels import build_for, build_library
from runtime.kernels import (
    ABI,
    ACTIVATIONS,
    BUILD,
    COUNTER,
    CUDA,
    DTYPES,
    NORM_PARTS,
    REFERENCE,
    STEP,
    DenoiseArgs,
    GroupNormArgs,
    Heads,
    Kernels,
    Planes,
    find_library,
    missing_programs,
    step_modes,
    step_table,
)
from runtime.noise import NoiseStream
from runtime.sampler import denoise
from runtime.schedulers import SchedulerConfig, dynamic_threshold, make_schedule

GUARD = 64  # elements before and after every tensor
HALVES = ("float16", "bfloat16")


def _skip_without_programs(target: str) -> None:
    if missing := missing_programs(target):
        pytest.skip(f"needs {' and '.join(missing)}")


def _build(folder: Path, *options: str, target: str) -> tuple[Path, str]:
    """The library, and what compiling it printed."""
    _skip_without_programs(target)
    return build_library(target, folder, *options)


def _library(name: str, *options: str) -> Path:
    return _build(BUILD / name, *options, target=name)[0]


def _reference() -> Kernels:
    return Kernels(_library("show1_kernels_ref", "-DCMAKE_CUDA_COMPILER=NOTFOUND"), suffix="_ref")


def _on_cpu() -> Kernels:
    if sys.platform != "linux":
        pytest.skip("tests/cuda_on_cpu needs Linux")
    return Kernels(_library("show1_kernels_on_cpu", "-DCMAKE_CUDA_COMPILER=NOTFOUND", "-DSHOW1_CUDA_ON_CPU=ON"))


def _gpu() -> Kernels:
    _skip_without_programs(CUDA)
    return Kernels(build_for("cuda"))


def test_a_library_for_another_card_serves_the_one_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cards, asked = [Gpu("", (8, 6), 0, (13, 0)), Gpu("", (12, 0), 0, (13, 0)), Gpu("", (8, 6), 0, (13, 0))], []

    def configure(library: str, folder: Path, chosen: Callable[[], list[str]]) -> tuple[Path, str]:
        (option,) = chosen()
        asked.append(option)
        folder.mkdir(exist_ok=True)
        (folder / "CMakeCache.txt").write_text(option.removeprefix("-D").replace("=", ":STRING="))
        return folder, ""

    monkeypatch.delenv("SHOW1_KERNELS", raising=False)
    monkeypatch.setattr("export.kernels.BUILD", tmp_path)
    monkeypatch.setattr("export.kernels.find_gpus", lambda: cards)
    monkeypatch.setattr("export.kernels.build_library", configure)
    build_for("cuda")
    cards[:] = [Gpu("", (9, 0), 0, (13, 0))]
    build_for("cuda")
    assert asked == ["-DCMAKE_CUDA_ARCHITECTURES=120;86", "-DCMAKE_CUDA_ARCHITECTURES=120;86;90"]


def test_a_compiler_that_only_cxx_names_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (compiler := tmp_path / "cc.exe").touch(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", f"{compiler} -O2")
    assert "a C++ compiler" not in missing_programs(REFERENCE)
    monkeypatch.delenv("CXX")
    assert "a C++ compiler" in missing_programs(REFERENCE)


class Driver:
    """Device memory through the CUDA driver, which is there wherever a GPU is."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)  # the one that the CUDA runtime uses
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        assert status == 0, f"{name}: CUresult {status}"

    def upload(self, array: np.ndarray) -> int:
        pointer = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(array.nbytes))
        self.copy_to_device(pointer.value, array)
        return pointer.value

    def copy_to_device(self, pointer: int, array: np.ndarray) -> None:
        size = ctypes.c_size_t(array.nbytes)
        self("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), ctypes.c_void_p(array.ctypes.data), size)

    def download(self, array: np.ndarray, pointer: int) -> None:
        size = ctypes.c_size_t(array.nbytes)
        self("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(pointer), size)

    def free(self, pointer: int) -> None:
        self("cuMemFree_v2", ctypes.c_uint64(pointer))


@dataclass
class Implementation:
    """Kernels with the memory that they work on: host arrays, or copies of them on the device."""

    kernels: Kernels
    driver: Driver | None = None
    _pointers: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def pointer(self, array: np.ndarray) -> int:
        """Where the kernels find the array from now on."""
        if self.driver is None:
            return array.ctypes.data
        self._pointers.append((array, self.driver.upload(array)))
        return self._pointers[-1][1]

    def fetch(self) -> None:
        """Bring the arrays that were given out up to date with what the kernels made of them."""
        for array, pointer in self._pointers:
            self.driver.download(array, pointer)

    def send(self) -> None:
        """And the other way round."""
        for array, pointer in self._pointers:
            self.driver.copy_to_device(pointer, array)

    def free(self) -> None:
        for _, pointer in self._pointers:
            self.driver.free(pointer)
        self._pointers.clear()


_LOADED: dict[str, Implementation] = {}


@pytest.fixture(params=["reference", "on_cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    name = request.param
    if name not in _LOADED:
        load = {"reference": _reference, "on_cpu": _on_cpu, "gpu": _gpu}[name]
        _LOADED[name] = Implementation(load(), Driver() if name == "gpu" else None)
    yield _LOADED[name]
    _LOADED[name].free()


# ---- Half precision in NumPy: float16, and bfloat16 as the upper half of a float32


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """float -> the dtype's bits, to nearest even; float32 stays."""
    if dtype == "float32":
        return x.astype(np.float32)
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The dtype's bits -> float32."""
    if dtype == "float32":
        return bits
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return from_bits(to_bits(x, dtype), dtype)


def storage(dtype: str, count: int) -> np.ndarray:
    """NaN in every element, aligned to 64 bytes as device memory is."""
    element = np.dtype(np.float32 if dtype == "float32" else np.uint16)
    raw = np.full(count * element.itemsize + 64, 0xFF, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * element.itemsize].view(element)


def assert_close_to_reference(
    actual: np.ndarray, reference: np.ndarray, naive: np.ndarray, dtype: str, factor: float = 2.0
) -> None:
    """At most `factor` times as far from float64 as plain half-precision arithmetic is, and half an ulp of 1."""
    half_ulp = 2.0**-11 if dtype == "float16" else 2.0**-8
    budget = factor * np.abs(naive - reference).max() + half_ulp
    error = np.abs(actual - reference).max()
    assert error <= budget, f"max error {error:.3e}, budget {budget:.3e}"


# ---- Temporal attention


@dataclass
class Tensor:
    """[B, F, P, H, D] values somewhere in a flat buffer."""

    buffer: np.ndarray
    offset: int
    view: np.ndarray

    @classmethod
    def in_layout(cls, layout: str, dtype: str, shape: tuple[int, ...], copies: int = 1) -> "list[Tensor]":
        """`copies` tensors of a layout, side by side in the channel axis of one buffer."""
        b, f, p, h, d = shape
        channels = copies * h * d + (layout == "odd")
        row = {"batch, pixel, frame": (p * f, 1, f), "batch, frame, pixel": (f * p, p, 1), "odd": (p * f, 1, f)}
        strides = [stride * channels for stride in row[layout]] + [d, 1]
        first = GUARD + (layout == "odd")
        buffer = storage(dtype, b * f * p * channels + 2 * GUARD)
        return [
            cls(buffer, offset, np.lib.stride_tricks.as_strided(buffer[offset:], shape, [2 * s for s in strides]))
            for offset in (first + copy * h * d for copy in range(copies))
        ]

    def heads(self, pointer: int) -> Heads:
        return Heads(pointer + 2 * self.offset, *(stride // 2 for stride in self.view.strides[:4]))


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """[B, F, P, H, D] float64."""
    q, k, v = (x.astype(np.float64).transpose(0, 2, 3, 1, 4) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 3, 1, 2, 4)


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    """What half precision gives when every operation rounds its result to it, as in eager torch."""
    q, k, v = (x.transpose(0, 2, 3, 1, 4) for x in (q, k, v))
    scores = rounded(rounded(q @ k.swapaxes(-1, -2), dtype) * np.float32(scale), dtype)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return rounded(rounded(weights / weights.sum(-1, keepdims=True), dtype) @ v, dtype).transpose(0, 3, 1, 2, 4)


def run_attention(
    implementation: Implementation,
    dtype: str,
    shape: tuple[int, ...],
    *,
    layout: str = "batch, pixel, frame",
    out_layout: str | None = None,
    packed: bool = False,
    in_place: bool = False,
    spread: float = 1.0,
) -> None:
    """One call, checked against float64, with all memory around the result untouched."""
    random = np.random.default_rng(sum(shape))
    tensors = (
        Tensor.in_layout(layout, dtype, shape, copies=3)
        if packed
        else [Tensor.in_layout(layout, dtype, shape)[0] for _ in range(3)]
    )
    values = [rounded(random.standard_normal(shape, np.float32) * size, dtype) for size in (spread, spread, 1)]
    for tensor, value in zip(tensors, values, strict=True):
        tensor.view[...] = to_bits(value, dtype)
    tensors.append(tensors[0] if in_place else Tensor.in_layout(out_layout or layout, dtype, shape)[0])

    buffers = {id(tensor.buffer): tensor.buffer for tensor in tensors}
    pointers = {name: implementation.pointer(buffer) for name, buffer in buffers.items()}
    expected = {name: buffer.copy() for name, buffer in buffers.items()}
    b, f, p, h, d = shape
    implementation.kernels.temporal_attention(
        dtype,
        *(tensor.heads(pointers[id(tensor.buffer)]) for tensor in tensors),
        batch=b,
        frames=f,
        pixels=p,
        heads=h,
        head_dim=d,
    )
    implementation.fetch()

    out = tensors[-1]
    actual = from_bits(np.ascontiguousarray(out.view), dtype)
    exact = exact_attention(*values, d**-0.5)
    assert_close_to_reference(actual, exact, plain_attention(*values, d**-0.5, dtype), dtype)
    # Apart from the result every bit is what it was.
    np.copyto(
        np.lib.stride_tricks.as_strided(expected[id(out.buffer)][out.offset :], shape, out.view.strides), out.view
    )
    for name, buffer in buffers.items():
        np.testing.assert_array_equal(buffer.view(np.uint16), expected[name].view(np.uint16))


# batch, frames, pixels, heads, head_dim of the published networks (fewer pixels), then what else is allowed.
SHOW1_SHAPES = [
    *((2, 8, 2, 64, d) for d in (10, 12, 15, 20)),
    *((1, 5, 3, 64, d) for d in (10, 15, 20)),
    *((1, 29, 3, heads, 64) for heads in (5, 8, 10, 20)),
]
OTHER_SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 3, 40, 9),  # several heads per block, the last block not full
    (1, 8, 2, 40, 15),  # whole rows, the last of 8 heads
    (1, 5, 1, 24, 32),
    (1, 8, 1, 7, 12),  # rows of 7 heads do not end on 16 bytes
    (1, 17, 2, 3, 7),
    (1, 64, 1, 2, 128),
    (1, 19, 2, 1, 111),
    *((1, f, 1, 3, 64) for f in (1, 7, 16, 17, 33, 48, 50, 64)),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHOW1_SHAPES + OTHER_SHAPES, ids=str)
def test_attention_is_as_exact_as_half_precision_allows(
    implementation: Implementation, shape: tuple[int, ...], dtype: str
) -> None:
    run_attention(implementation, dtype, shape)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("out_layout", ["batch, pixel, frame", "batch, frame, pixel", "odd"])
@pytest.mark.parametrize("layout", ["batch, pixel, frame", "batch, frame, pixel", "odd"])
@pytest.mark.parametrize("shape", [(2, 8, 3, 8, 15), (2, 5, 3, 8, 10), (2, 29, 3, 2, 64), (2, 6, 3, 5, 11)], ids=str)
def test_attention_reads_and_writes_any_layout(
    implementation: Implementation, shape: tuple[int, ...], layout: str, out_layout: str, packed: bool
) -> None:
    run_attention(implementation, "float16", shape, layout=layout, out_layout=out_layout, packed=packed)


@pytest.mark.parametrize("shape", [(1, 8, 2, 40, 15), (1, 50, 2, 2, 64), (1, 37, 2, 3, 12)], ids=str)
def test_attention_may_replace_its_queries(implementation: Implementation, shape: tuple[int, ...]) -> None:
    run_attention(implementation, "float16", shape, in_place=True)


@pytest.mark.parametrize("shape", [(1, 8, 2, 8, 12), (1, 29, 2, 2, 64), (1, 12, 2, 3, 20)], ids=str)
def test_attention_to_one_frame_alone_neither_overflows_nor_fades(
    implementation: Implementation, shape: tuple[int, ...]
) -> None:
    run_attention(implementation, "float16", shape, spread=30)


def test_turing_has_bfloat16_without_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOW1_EMULATED_CAPABILITY", "75")
    for dtype in HALVES:
        run_attention(Implementation(_on_cpu()), dtype, (1, 29, 1, 2, 64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 65},
        {"frames": 0},
        {"head_dim": 129},
        {"head_dim": 0},
        {"batch": -1},
        {"pixels": 2**31 - 1},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"dtype": "float32"},
        {"q": Heads()},
        {"v": Heads(65)},
    ],
    ids=str,
)
def test_attention_refuses_what_it_cannot_do(implementation: Implementation, wrong: Mapping[str, Any]) -> None:
    tensor = Heads(implementation.pointer(storage("float16", 64)))
    arguments = {"dtype": "float16", "q": tensor, "batch": 1, "frames": 2, "pixels": 2, "heads": 2, "head_dim": 4}
    with pytest.raises(EngineError, match=r"an argument is outside what kernels/include/show1/temporal_attention\.h"):
        implementation.kernels.temporal_attention(**{**arguments, **dict.fromkeys(("k", "v", "out"), tensor), **wrong})


# ---- Group normalisation


@dataclass
class Norm:
    """One call: x [N, rows, C], add [1 or N / repeat, C], scale and shift [N / repeat, C] side by side."""

    batch: int
    rows: int
    channels: int
    groups: int
    repeat: int = 1
    activation: str = "none"
    adds: str = ""  # "one" row for all, or one "each"
    modulates: bool = False
    offset: int = 0  # of x and the result from an address of 64 bytes, in elements
    mean: float = 0.0

    def run(self, implementation: Implementation, dtype: str) -> None:
        """Checked against float64 and plain half precision, with all memory around the result untouched."""
        random = np.random.default_rng(self.rows * self.channels)

        def draw(shape: tuple[int, ...], mean: float = 0.0, size: float = 1.0) -> np.ndarray:
            return rounded(random.standard_normal(shape, np.float32) * np.float32(size) + np.float32(mean), dtype)

        def placed(values: np.ndarray, offset: int = 0) -> int:
            buffer = storage(dtype, values.size + offset)
            buffer[offset:] = to_bits(values, dtype).ravel()
            kept.append(buffer)
            return implementation.pointer(buffer) + 2 * offset

        kept: list[np.ndarray] = []  # the kernels know their addresses alone
        clips = -(-self.batch // self.repeat)
        shape = (self.batch, self.rows, self.channels)
        of_clip = np.arange(self.batch) // self.repeat
        drift = np.linspace(-3, 3, self.rows, dtype=np.float32)[:, None]  # lest parts of unequal size look alike
        x = rounded(draw(shape, self.mean) + drift, dtype)
        weight, bias = draw((self.channels,), 1.0, 0.3), draw((self.channels,))
        add = draw((1 if self.adds == "one" else clips, self.channels)) if self.adds else None
        modulation = draw((clips, 2, self.channels), size=0.3) if self.modulates else None

        def plain(step: Any) -> np.ndarray:
            """`step` rounds what an operation gives."""
            y = step(x if add is None else x + add[of_clip if len(add) > 1 else np.zeros_like(of_clip)][:, None])
            grouped = y.reshape(self.batch, self.rows, self.groups, -1)
            mean = grouped.mean((1, 3), keepdims=True)
            var = np.square(grouped - mean).mean((1, 3), keepdims=True)
            y = step(((grouped - mean) / np.sqrt(var + 1e-5)).reshape(shape) * weight + bias)
            if modulation is not None:
                scale, shift = modulation[of_clip][:, :, None].swapaxes(0, 1)
                y = step(step(y * step(1 + scale)) + shift)
            return step(ACTIVATED[self.activation](y))

        size = self.batch * NORM_PARTS * self.groups * 2
        partials = storage("float32", size + GUARD)
        args = GroupNormArgs(
            dtype=DTYPES[dtype],
            batch=self.batch,
            rows=self.rows,
            channels=self.channels,
            groups=self.groups,
            repeat=self.repeat,
            activation=ACTIVATIONS[self.activation],
            eps=1e-5,
            x=placed(x, self.offset),
            weight=placed(weight),
            bias=placed(bias),
            partials=implementation.pointer(partials),
        )
        if add is not None:
            args.add, args.add_row = placed(add), 0 if self.adds == "one" else self.channels
        if modulation is not None:
            args.scale, args.modulation_row = placed(modulation), 2 * self.channels
            args.shift = args.scale + 2 * self.channels
        out = storage(dtype, x.size + 2 * GUARD + self.offset)
        first = GUARD + self.offset
        args.out = implementation.pointer(out) + 2 * first
        implementation.kernels.group_norm(args)
        implementation.fetch()
        with np.errstate(over="ignore"):
            exact = plain(lambda y: y.astype(np.float64))
            naive = plain(lambda y: rounded(y.astype(np.float32), dtype))
        assert_close_to_reference(from_bits(out[first : first + x.size], dtype).reshape(shape), exact, naive, dtype)
        assert (out[:first] == 0xFFFF).all() and (out[first + x.size :] == 0xFFFF).all()
        assert np.isnan(partials[size:]).all()


ACTIVATED: dict[str, Any] = {
    "none": lambda y: y,
    "silu": lambda y: y / (1 + np.exp(-y)),
    "gelu": lambda y: y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2,
}
# Channels of the published networks, with fewer rows: base, interp and sr2 (320 k), sr1 (128 k, joined 384 and more).
NORMS = [
    Norm(4, 40, 320, 32, repeat=2, activation="gelu", adds="one", modulates=True),
    Norm(2, 300, 384, 32, activation="silu", adds="one"),
    Norm(2, 33, 640, 32, adds="each", activation="silu"),
    Norm(3, 5, 1280, 32, repeat=3, activation="gelu", adds="each", modulates=True),
    Norm(5, 130, 320, 32, repeat=5, activation="silu", adds="each", modulates=True),
    Norm(1, 3, 2560, 32, modulates=True),
    Norm(3, 160, 1920, 32, activation="gelu"),  # 58,576 bytes of shared memory, more than cards give unasked
    Norm(5, 1, 128, 32, repeat=5, activation="gelu"),
]
OTHER_NORMS = [
    Norm(1, 700, 16, 8, activation="silu"),  # more rows than one turn of every thread
    Norm(1, 1300, 160, 32),  # as many parts as there may be
    Norm(1, 9, 96, 48, activation="silu"),  # more groups than a warp has lanes
    Norm(2, 9, 30, 3, repeat=2, activation="gelu", adds="one", modulates=True),  # no pieces of 16 bytes
    Norm(2, 9, 48, 8, offset=3, activation="silu"),
    Norm(1, 2, 3001, 1),  # more channels than threads, an odd number
    Norm(1, 3, 4096, 32, activation="gelu", adds="one"),  # and more pieces
    Norm(7, 4, 8, 1, repeat=3, adds="each", modulates=True),
    Norm(1, 1, 1, 1, adds="one"),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("norm", NORMS + OTHER_NORMS, ids=str)
def test_norms_are_as_exact_as_half_precision_allows(implementation: Implementation, dtype: str, norm: Norm) -> None:
    norm.run(implementation, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_mean_far_from_zero_costs_a_norm_no_digits(implementation: Implementation, dtype: str) -> None:
    Norm(2, 120, 32, 4, mean=1000.0).run(implementation, dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 3},
        {"groups": 0},
        {"rows": 0},
        {"rows": 2**31 - 1},
        {"batch": 2**25},
        {"channels": 4104},
        {"channels": 1024, "groups": 1024},
        {"repeat": 0},
        {"eps": 0.0},
        {"eps": math.inf},
        {"activation": 3},
        {"activation": -1},
        {"dtype": DTYPES["float32"]},
        {"x": None},
        {"x": 65},
        {"out": None},
        {"weight": None},
        {"partials": None},
        {"partials": 66},
        {"scale": 64},
        {"shift": 64},
    ],
    ids=str,
)
def test_norms_refuse_what_they_cannot_do(implementation: Implementation, wrong: Mapping[str, Any]) -> None:
    sizes = {"batch": 1, "rows": 2, "channels": 8, "groups": 2, "repeat": 1}
    buffers = {name: storage("float32", 256) for name in ("x", "out", "weight", "bias", "partials")}
    args = GroupNormArgs(**sizes, eps=1e-5, **{name: implementation.pointer(b) for name, b in buffers.items()})
    for name, value in wrong.items():
        setattr(args, name, value)
    with pytest.raises(EngineError, match=r"kernels/include/show1/group_norm\.h"):
        implementation.kernels.group_norm(args)


# ---- Denoising step


class Loop:
    """What a denoising loop keeps where the kernels run, each array between guard zones of NaN."""

    def __init__(
        self, implementation: Implementation, dtype: str, shape: tuple[int, ...], guided: bool, frames_first: bool
    ):
        self.implementation, self.dtype, self.shape, self.frames_first = implementation, dtype, shape, frames_first
        self.network_batch = shape[0] * (1 + guided)
        self.flat: list[np.ndarray] = []
        self.args = DenoiseArgs(
            dtype=DTYPES[dtype],
            batch=shape[0],
            channels=shape[1],
            frames=shape[2],
            pixels=shape[3] * shape[4],
            guided=guided,
        )

    def _add(self, dtype: str, count: int) -> tuple[np.ndarray, int]:
        flat = storage(dtype, count + 2 * GUARD)
        self.flat.append(flat)
        return flat[GUARD:-GUARD], self.implementation.pointer(flat) + flat.itemsize * GUARD

    def array(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype | type = np.float32,
        strides: tuple[int, int, int] | None = None,
    ) -> np.ndarray:
        """A contiguous array of 4-byte elements or of records of them; with strides, one that is read as planes."""
        inner, pointer = self._add("float32", int(np.prod(shape)) * np.dtype(dtype).itemsize // 4)
        setattr(self.args, name, Planes(pointer, *strides) if strides else pointer)
        return inner.view(dtype).reshape(shape)

    def planes(self, name: str, channels: int, batch: int | None = None) -> np.ndarray:
        """A tensor of the network, seen as [B, C, F, H, W] whether or not the frames come first."""
        _, _, frames, height, width = self.shape
        batch = batch or self.network_batch
        inner, pointer = self._add(self.dtype, batch * channels * frames * height * width)
        axes = (frames, channels) if self.frames_first else (channels, frames)
        seen = inner.reshape(batch, *axes, height, width)
        seen = seen.swapaxes(1, 2) if self.frames_first else seen
        setattr(self.args, name, Planes(pointer, *(stride // inner.itemsize for stride in seen.strides[:3])))
        return seen

    def step(self) -> None:
        self.implementation.send()
        self.implementation.kernels.denoise_step(self.args)
        self.implementation.fetch()
        for flat in self.flat:
            for guard in (flat[:GUARD], flat[-GUARD:]):
                assert (guard.view(np.uint8) == 0xFF).all(), "written beside a buffer"


def network(sample: np.ndarray, timestep: float, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Some function of [N, C + K, F, H, W] whose values are large enough to be limited: noise_pred, variance_frac."""
    x = sample[:, :channels]
    phase = np.arange(len(x), dtype=np.float32).reshape(-1, 1, 1, 1, 1) + np.float32(timestep)
    return np.float32(0.8) * x + np.float32(0.3) * np.sin(5 * x + phase), np.cos(3 * x + phase)


# The published schedulers, then what else a checkpoint may ask for.
STEP_CASES: dict[str, tuple[dict[str, Any], float, str]] = {
    "base": (PUBLISHED["base"], 9.0, "float16"),
    "interp": (PUBLISHED["base"], 4.0, "bfloat16"),
    "if2": (PUBLISHED["if2"], 4.0, "float16"),
    "sr1": (PUBLISHED["sr1"], 7.0, "float16"),
    "sr2": (PUBLISHED["sr2"], 15.0, "float16"),
    "unguided": (PUBLISHED["base"], 1.0, "float32"),
    "ddpm, clipped": ({**PUBLISHED["noising"], "clip_sample_range": 1.25}, 2.0, "float32"),
    "ddpm, dynamic": ({**PUBLISHED["if1"], "thresholding": True}, 3.0, "bfloat16"),
    "ddpm, variance learned": ({**PUBLISHED["if2"], "variance_type": "learned"}, 3.0, "float16"),
    "first order": ({**PUBLISHED["sr2"], "solver_order": 1}, 2.0, "float16"),
}


@pytest.mark.parametrize("frames_first", [False, True], ids=["B C F", "B F C"])
@pytest.mark.parametrize("shape", [(1, 3, 2, 6, 8), (2, 4, 3, 33, 35)], ids=str)
@pytest.mark.parametrize("case", STEP_CASES)
def test_a_denoising_loop_equals_the_sampler(
    implementation: Implementation, case: str, shape: tuple[int, ...], frames_first: bool
) -> None:
    config, guidance_scale, dtype = STEP_CASES[case]
    schedule = make_schedule(SchedulerConfig.from_dict(config, case), 4)
    random = np.random.default_rng(3)
    x = random.standard_normal(shape, np.float32)
    condition = rounded(random.standard_normal((shape[0], 2, *shape[2:]), np.float32), dtype)
    channels = shape[1]

    def unet(sample: np.ndarray, timestep: int) -> tuple[np.ndarray, np.ndarray]:
        noise_pred, variance = network(rounded(sample, dtype), timestep, channels)
        variance = np.abs(variance) if config.get("variance_type") == "learned" else variance
        return rounded(noise_pred, dtype), rounded(variance, dtype)

    expected = [x]
    denoise(
        unet,
        x,
        schedule,
        guidance_scale=guidance_scale,
        noise=NoiseStream(5),
        condition=condition,
        on_step=lambda _index, _total, x: expected.append(x.copy()),
    )

    loop = Loop(implementation, dtype, shape, guidance_scale > 1, frames_first)
    for name, value in step_modes(schedule).items():
        setattr(loop.args, name, value)
    loop.array("table", (len(schedule),), STEP)[...] = step_table(schedule, guidance_scale)
    counter = loop.array("counter", (), COUNTER)
    counter[...] = (0, len(schedule), 0)
    sample = loop.array("sample", shape)
    if schedule.previous_x0_weight.any():
        loop.array("x0", shape)
    noise_pred = loop.planes("noise_pred", channels)
    if schedule.config.learned_variance:
        variance_frac = loop.planes("variance_frac", channels, shape[0])
    network_input = loop.planes("network_input", channels + 2)
    timesteps = loop.array("timesteps", (loop.network_batch,))
    if schedule.adds_noise(0):
        drawn_shape, pixels = (shape[2], channels, *shape[3:]), loop.args.pixels
        drawn = loop.array("noise", drawn_shape, strides=(0, pixels, channels * pixels))
        stream = NoiseStream(5)

    sample[...] = x
    network_input[:, :channels] = np.tile(to_bits(x, dtype), (loop.network_batch // shape[0], 1, 1, 1, 1))
    network_input[:, channels:] = np.tile(to_bits(condition, dtype), (loop.network_batch // shape[0], 1, 1, 1, 1))
    exact = schedule.config.solver == "dpm"  # no exp() in its steps
    for index, timestep in enumerate(schedule.timesteps):
        predicted, variance = unet(from_bits(np.ascontiguousarray(network_input), dtype), timestep)
        noise_pred[...] = to_bits(predicted, dtype)
        if schedule.config.learned_variance:
            variance_frac[...] = to_bits(variance[-shape[0] :], dtype)
        if schedule.adds_noise(0):  # the last step must not read its NaN
            drawn[...] = stream.normal(drawn_shape) if schedule.adds_noise(index) else np.nan
        loop.step()
        if exact:
            np.testing.assert_array_equal(sample, expected[index + 1])
        else:
            np.testing.assert_allclose(sample, expected[index + 1], rtol=0, atol=2e-6)
            sample[...] = expected[index + 1]  # or else the network would see other roundings
            network_input[:, :channels] = np.tile(to_bits(sample, dtype), (loop.network_batch // shape[0], 1, 1, 1, 1))
        for item in range(loop.network_batch):
            own = item % shape[0]
            np.testing.assert_array_equal(network_input[item, :channels], to_bits(sample[own], dtype))
            np.testing.assert_array_equal(network_input[item, channels:], to_bits(condition[own], dtype))
        assert (timesteps == schedule.timesteps[min(index + 1, len(schedule) - 1)]).all(), "the last one stays"
    assert counter.tolist() == (len(schedule), len(schedule), 0)

    before = sample.copy()
    loop.step()
    np.testing.assert_array_equal(sample, before, "a step beyond the last did something")


def limited(
    implementation: Implementation, values: np.ndarray, ratio: float, most: float, **modes: int | float
) -> np.ndarray:
    """What the kernel makes of x0 = values, float32 [B, C, F, H, W]."""
    loop = Loop(implementation, "float32", values.shape, guided=False, frames_first=False)
    loop.args.limit, loop.args.limit_ratio, loop.args.limit_max = modes.get("limit", 2), ratio, most
    row = loop.array("table", (1,), STEP)
    row[...] = 0
    row["pred_weight"], row["divisor"], row["x0_weight"], row["max_log_var"] = -1, 1, 1, -np.inf  # x0 = 0 + noise_pred
    loop.array("counter", (), COUNTER)[...] = (0, 1, 0)
    sample = loop.array("sample", values.shape)
    sample[...] = 0
    loop.planes("noise_pred", values.shape[1])[...] = values
    loop.step()
    return sample


@pytest.mark.parametrize("most", [1.5, 100.0, np.inf])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.95, 0.995, 1.0])
@pytest.mark.parametrize("kind", ["normal", "small", "large", "tied", "infinite", "huge", "gap", "single"])
def test_the_threshold_is_the_exact_quantile(
    implementation: Implementation, kind: str, ratio: float, most: float
) -> None:
    random = np.random.default_rng(7)
    values = random.standard_normal((2, 3, 2, 5, 7)).astype(np.float32) * 2
    if kind == "small":
        values /= 10
    elif kind == "large":
        values *= 100
    elif kind == "tied":
        values = np.round(values)
    elif kind == "infinite":
        values[:, :, 1] = np.where(values[:, :, 1] > 1, np.inf, values[:, :, 1])
    elif kind == "huge":
        values *= np.float32(5e37)  # up to 3.3e38: just finite
    elif kind == "gap":  # 99 of a frame's 105: the quantile 0.95 lies between 0.5 and 3, above 1
        values[...] = 0.5
        values[:, 2, :, 4, 1:] = -3
    elif kind == "single":
        values = values[:, :1, :, :1, :1]
    expected = np.empty_like(values)
    dynamic_threshold(values, ratio, most, expected)
    np.testing.assert_array_equal(limited(implementation, values, ratio, most), expected)


def test_frames_too_large_for_shared_memory_are_thresholded_too(implementation: Implementation) -> None:
    """231 KB: no card keeps them there."""
    values = np.random.default_rng(2).standard_normal((1, 3, 1, 140, 141), np.float32) * 2
    expected = np.empty_like(values)
    dynamic_threshold(values, 0.95, 8.0, expected)
    np.testing.assert_array_equal(limited(implementation, values, 0.95, 8.0), expected)


def test_nan_stays_where_it_is(implementation: Implementation) -> None:
    values = np.full((1, 1, 1, 4, 8), 3, np.float32)
    values[..., 0, 0] = np.nan
    for limit, most, expected in ((0, 2.0, 3.0), (1, 2.0, 2.0), (2, 2.0, 1.0)):
        result = limited(implementation, values, 0.5, most, limit=limit)
        assert np.isnan(result[..., 0, 0]) and (result.ravel()[1:] == expected).all()


@pytest.mark.parametrize(("dtype", "large"), [("float16", 6e4), ("bfloat16", 3e38)])
def test_half_precision_keeps_what_is_not_finite(implementation: Implementation, dtype: str, large: float) -> None:
    values = np.float32([np.nan, np.inf, -np.inf, large, -large, 2e-7]).reshape(1, 1, 1, 1, 6)
    loop = Loop(implementation, dtype, values.shape, guided=False, frames_first=False)
    row = loop.array("table", (1,), STEP)
    row[...] = 0
    row["pred_weight"], row["divisor"], row["x0_weight"], row["max_log_var"] = -1, 1, 2, -np.inf
    loop.array("counter", (), COUNTER)[...] = (0, 1, 0)
    loop.array("sample", values.shape)[...] = 0
    loop.planes("noise_pred", 1)[...] = to_bits(values, dtype)
    network_input = loop.planes("network_input", 1)
    loop.step()
    seen = from_bits(np.ascontiguousarray(network_input), dtype).ravel()
    np.testing.assert_array_equal(seen, [np.nan, np.inf, -np.inf, np.inf, -np.inf, 2 * rounded(values, dtype).item(5)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"channels": 2**16, "frames": 2**16},
        {"limit": 3},
        {"limit": 2, "limit_max": 0.5},
        {"limit": 2, "limit_ratio": 1.5},
        {"limit": 2, "limit_ratio": float("nan")},
        {"limit": 1, "limit_max": -1.0},
        {"variance": 1},  # and no variance_frac
        {"variance": 3},
        {"dtype": 3},
        {"table": None},
        {"counter": None},
        {"sample": None},
        {"noise_pred": Planes()},
    ],
    ids=str,
)
def test_the_denoising_step_refuses_what_it_cannot_do(implementation: Implementation, wrong: Mapping[str, Any]) -> None:
    loop = Loop(implementation, "float16", (1, 3, 2, 4, 4), guided=True, frames_first=False)
    loop.args.limit_max = 1
    for name in ("table", "counter", "sample", "x0"):
        loop.array(name, (96,))
    loop.planes("noise_pred", 3)
    for name, value in wrong.items():
        setattr(loop.args, name, value)
    with pytest.raises(EngineError, match=r"kernels/include/show1/denoise_step\.h"):
        implementation.kernels.denoise_step(loop.args)


# ---- Libraries


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.cpp").write_text('extern "C" int show1_abi() { return 0; }')
    subprocess.run(["c++", "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.cpp"], check=True)
    with pytest.raises(EngineError, match=r"old\.so was built from another version's headers\. Build it"):
        Kernels(tmp_path / "old.so")
    (tmp_path / "none.so").write_text("not a library")
    with pytest.raises(EngineError, match=r"none\.so cannot be loaded \(.*\)\. Build it"):
        Kernels(tmp_path / "none.so")


@pytest.mark.parametrize("newest", ["a", "b"])
def test_the_newest_build_of_a_library_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newest: str) -> None:
    monkeypatch.setenv("SHOW1_KERNELS", str(tmp_path))
    for folder in ("a", "b"):
        (tmp_path / folder / f"{CUDA}.dir").mkdir(parents=True)  # CMake's
        for name in (f"lib{CUDA}.so", f"lib{CUDA}_ref.so", f"{CUDA}.lib"):
            (tmp_path / folder / name).touch()
        os.utime(tmp_path / folder / f"lib{CUDA}.so", (folder == newest, folder == newest))
    assert find_library(CUDA) == tmp_path / newest / f"lib{CUDA}.so"


def test_a_kernel_that_cuda_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _reference()
    monkeypatch.setitem(kernels._functions, "denoise_step", lambda *_: 209)
    with pytest.raises(EngineError, match=r"denoise_step: CUDA could not start the kernel \(cudaError_t 209\)"):
        kernels.denoise_step(DenoiseArgs())


def test_the_headers_and_python_have_the_same_version() -> None:
    header = (Path(__file__).parents[1] / "kernels/include/show1/types.h").read_text()
    assert f"#define SHOW1_ABI {ABI}\n" in header


# ---- The CUDA sources


def test_cuda_sources_compile_for_all_architectures_without_spills(tmp_path: Path) -> None:
    library, printed = _build(tmp_path / "build", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v", target="show1_kernels")
    for architecture in (75, 80, 86, 89, 90, 120):
        assert f"'sm_{architecture}'" in printed
    spills = [line for line in printed.splitlines() if "bytes spill stores" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
    assert "warning" not in printed
    ctypes.CDLL(str(library))
