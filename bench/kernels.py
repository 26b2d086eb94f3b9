"""The CUDA kernels at the shapes of the published networks: checked, then timed against torch's ways to the result.

Every time is that of one call on cold caches: the L2 is swept between calls. What can be captured is timed as a CUDA
graph, so that no launch gap is in it. The yardstick is a copy of as many bytes, timed in the same way.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.machine import ROOT
from bench.plots import Axis, Chart
from bench.report import NOTHING, Content, Table, median, number, share, spread
from bench.timing import Summary, measure_gpu, summarize
from engines.errors import EngineError
from engines.gpu import find_gpus
from engines.memory import GIB
from engines.tensorrt import installed_version
from export.configs import SCHEDULERS
from export.kernels import build_library, native
from runtime.kernels import (
    ACTIVATIONS,
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
    step_modes,
    step_table,
)
from runtime.schedulers import SchedulerConfig, make_schedule

DEVICE = "cuda"
BUILD = ROOT / "build" / "bench-kernels"
COPY_BYTES = 2**30  # of the large copy: read and written, well beyond any L2


@dataclass(frozen=True)
class AttentionShape:
    """Temporal attention in one place of a network; `batch` is 2 for guidance, 14 for seven guided gaps."""

    stage: str
    batch: int
    frames: int
    height: int
    width: int
    heads: int
    head_dim: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def bytes(self) -> int:
        """q, k and v read, the result written, in half precision."""
        return 8 * self.batch * self.frames * self.pixels * self.heads * self.head_dim

    def __str__(self) -> str:
        return (
            f"{self.stage} {self.batch} x {self.frames} x {self.height} x {self.width}, {self.heads} x {self.head_dim}"
        )


_LEVELS = ((20, 32, 10), (10, 16, 15), (5, 8, 20))  # of the pixel UNets: height, width, head_dim
ATTENTION_SHAPES = (
    *(AttentionShape("base", 2, 8, h, w, 64, d) for h, w, d in _LEVELS),
    *(AttentionShape("interp", 14, 5, h, w, 64, d) for h, w, d in _LEVELS),
    *(AttentionShape("sr1", 2, 8, h, w, 64, 12) for h, w in ((20, 32), (10, 16))),
    AttentionShape("sr2 in", 2, 29, 40, 72, 8, 64),
    *(AttentionShape("sr2", 2, 29, h, w, n, 64) for h, w, n in ((40, 72, 5), (20, 36, 10), (10, 18, 20), (5, 9, 20))),
)


@dataclass(frozen=True)
class NormShape:
    """Group normalisation in one place of a network, in 32 groups, with what the kernel takes over there.

    In a residual block statistics are of a frame, scale and shift of a clip; before a convolution over frames they are
    of a clip. What is added is the bias of the convolution before.
    """

    stage: str
    batch: int
    rows: int
    channels: int
    activation: str
    clips: int = 0  # that scale and shift are of; 0: none

    @property
    def bytes(self) -> int:
        """x read and the result written, once each, in half precision."""
        return 4 * self.batch * self.rows * self.channels

    def __str__(self) -> str:
        modulated = ", scale and shift" if self.clips else ""
        return f"{self.stage} {self.batch} x {self.rows} x {self.channels}, {self.activation}{modulated}"


NORM_SHAPES = (
    NormShape("base", 16, 40 * 64, 320, "gelu", clips=2),
    NormShape("base", 16, 5 * 8, 1280, "gelu", clips=2),
    NormShape("base", 2, 8 * 40 * 64, 320, "silu"),
    NormShape("base", 2, 8 * 5 * 8, 1280, "silu"),
    NormShape("interp", 70, 40 * 64, 320, "gelu", clips=14),
    NormShape("interp", 14, 5 * 40 * 64, 320, "silu"),
    NormShape("sr1", 16, 160 * 256, 128, "gelu", clips=2),
    NormShape("sr1", 2, 8 * 160 * 256, 128, "silu"),
    NormShape("sr2", 58, 40 * 72, 320, "silu"),
    NormShape("sr2", 2, 29 * 40 * 72, 320, "silu"),
)

STEP_SHAPES: dict[str, tuple[int, ...]] = {  # stage -> sample [B, C, F, H, W]
    "base": (1, 3, 8, 40, 64),
    "interp": (7, 3, 5, 40, 64),
    "if2": (1, 3, 1, 160, 256),
    "sr1": (1, 3, 8, 160, 256),
    "sr2": (1, 4, 29, 40, 72),
}


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: seconds of ours, of a copy of as many bytes, and of the others."""

    kernel: str
    shape: str
    bytes: int
    error: float  # of ours against the reference
    budget: float  # what it may be
    ours: Summary
    copy: Summary
    others: Mapping[str, Summary | None]  # None: not installed, or it refuses the shape

    @property
    def right(self) -> bool:
        return self.error <= self.budget  # NaN is not


def torch_with_gpu() -> Any:
    try:
        import torch
    except ImportError:
        raise EngineError("torch is not installed. The kernels' benchmark needs it, with CUDA.") from None
    if not torch.cuda.is_available():
        if gpus := find_gpus():
            from runtime.runner_inductor import why_idle

            raise EngineError(f"{why_idle(gpus[0])}.")
        raise EngineError("no GPU: torch finds no usable NVIDIA card here, and only there the kernels can be measured.")
    return torch


def build_kernels(architectures: str) -> tuple[Kernels, Kernels]:
    """The CUDA library for `architectures` (CMake's words, e.g. native; "all": the fat binary) and its references."""
    architectures = native() if architectures == "native" else architectures
    folder = BUILD / architectures.replace(";", "-")
    options = [] if architectures == "all" else [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
    cuda, references = (build_library(name, folder, *options)[0] for name in (CUDA, REFERENCE))
    return Kernels(cuda), Kernels(references, suffix="_ref")


def describe_gpu(torch: Any) -> dict[str, Any]:
    """What a kernel's time depends on beyond the machine: card, driver's CUDA, compilers, baselines' versions."""
    card = torch.cuda.get_device_properties(0)
    return {
        "name": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_gib": round(card.total_memory / GIB, 1),
        "l2_mib": round(card.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "versions": {name: installed_version(name) for name in ("torch", "triton", "xformers")},
    }


def card_name(card: Mapping[str, Any]) -> str:
    """A described GPU in a file's name."""
    return "-".join(re.findall(r"[a-z0-9]+", card["name"].lower()))


class KernelBench:
    """Kernels and baselines on the current GPU. `warmup` and `repeats` are calls of each."""

    def __init__(self, torch: Any, kernels: Kernels, references: Kernels, warmup: int, repeats: int):
        self.torch, self.kernels, self.references = torch, kernels, references
        self.warmup, self.repeats = warmup, repeats
        self._copies: dict[int, Summary] = {}

    def time(self, call: Callable[[], Any], graph: bool = True) -> Summary:
        summary = summarize(measure_gpu(call, self.warmup, self.repeats, graph=graph))
        assert summary is not None
        return summary

    def try_to_time(self, call: Callable[[], Any], graph: bool = True) -> Summary | None:
        """None for a baseline that does not take the shape; it says so by one of these."""
        try:
            return self.time(call, graph)
        except (ImportError, ValueError, RuntimeError):
            self.torch.cuda.synchronize()  # raises where it is the card that is lost
            return None

    def copy(self, count: int) -> Summary:
        """The faster of two ways to read count / 2 bytes and write as many: a memory copy, and a kernel."""
        if count not in self._copies:
            words = self.torch.randint(2**31, (count // 16,), device=DEVICE)
            target = self.torch.empty_like(words)
            ways = (lambda: target.copy_(words), lambda: self.torch.bitwise_not(words, out=target))
            self._copies[count] = min(map(self.time, ways), key=lambda summary: summary.median)
        return self._copies[count]

    @property
    def stream(self) -> int:
        return self.torch.cuda.current_stream().cuda_stream

    # ---- Temporal attention

    def attention(self, shape: AttentionShape, frames_first: bool) -> Row:
        """With frames first the tensors are [B, F, H*W, C], else [B, H*W, F, C], where no permute is needed."""
        torch = self.torch
        sizes = (shape.batch, shape.frames, shape.pixels) if frames_first else (shape.batch, shape.pixels, shape.frames)
        torch.manual_seed(0)
        packed = torch.randn(*sizes, 3, shape.heads, shape.head_dim, device=DEVICE).half()
        q, k, v = (x.contiguous() for x in packed.unbind(3))  # [.., heads, head_dim]
        out = torch.full_like(q, torch.nan)

        def heads(x: Any) -> Heads:
            batch, first, second, head, _ = x.stride()
            frame, pixel = (first, second) if frames_first else (second, first)
            return Heads(x.data_ptr(), batch, frame, pixel, head)

        def ours() -> None:
            self.kernels.temporal_attention(
                "float16",
                *map(heads, (q, k, v, out)),
                batch=shape.batch,
                frames=shape.frames,
                pixels=shape.pixels,
                heads=shape.heads,
                head_dim=shape.head_dim,
                stream=self.stream,
            )

        def by_pixel(x: Any) -> Any:
            """[B * H*W, F, heads, head_dim]; a copy if the frames come first."""
            x = x.permute(0, 2, 1, 3, 4) if frames_first else x
            return x.reshape(-1, shape.frames, shape.heads, shape.head_dim)

        def back(x: Any) -> Any:
            x = x.reshape(shape.batch, shape.pixels, shape.frames, shape.heads, shape.head_dim)
            return x.permute(0, 2, 1, 3, 4).contiguous() if frames_first else x.contiguous()

        def sdpa(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (by_pixel(x).transpose(1, 2) for x in (q, k, v))
            return back(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2))

        def in_float64() -> Any:
            q64, k64, v64 = (by_pixel(x).transpose(1, 2).double() for x in (q, k, v))
            weights = (q64 @ k64.transpose(-1, -2) * shape.head_dim**-0.5).softmax(-1)
            return back((weights @ v64).transpose(1, 2))

        def xformers() -> Any:
            from xformers.ops import memory_efficient_attention

            return back(memory_efficient_attention(by_pixel(q), by_pixel(k), by_pixel(v)))

        ours()
        exact = in_float64()
        error = float((out.double() - exact).abs().max())  # NaN where nothing was written
        plain = float((sdpa(q, k, v).double() - exact).abs().max())
        del exact
        torch._dynamo.reset()  # else shapes after the eighth would run eagerly
        compiled = torch.compile(sdpa, dynamic=False)
        return Row(
            kernel="temporal attention",
            shape=f"{shape}, {'frames first' if frames_first else 'pixels first'}",
            bytes=shape.bytes,
            error=error,
            budget=2 * plain + torch.finfo(torch.float16).eps / 2,
            ours=self.time(ours),
            copy=self.copy(shape.bytes),
            others={
                "SDPA": self.try_to_time(lambda: sdpa(q, k, v)),
                "compiled": self.try_to_time(lambda: compiled(q, k, v)),
                "xformers": self.try_to_time(xformers),
            },
        )

    # ---- Group normalisation

    def norm(self, shape: NormShape) -> Row:
        torch = self.torch
        functional = torch.nn.functional
        half = torch.float16
        groups, eps = 32, 1e-5
        torch.manual_seed(0)

        def draw(*sizes: int) -> Any:
            return torch.randn(*sizes, device=DEVICE).to(half)

        x, weight, bias, add = (
            draw(*sizes) for sizes in ((shape.batch, shape.rows, shape.channels), *[(shape.channels,)] * 3)
        )
        modulation = draw(shape.clips, 2 * shape.channels) if shape.clips else None
        out = torch.full_like(x, torch.nan)
        partials = torch.empty(shape.batch * NORM_PARTS * groups * 2, device=DEVICE)
        args = GroupNormArgs(
            dtype=DTYPES["float16"],
            batch=shape.batch,
            rows=shape.rows,
            channels=shape.channels,
            groups=groups,
            repeat=shape.batch // (shape.clips or 1),
            activation=ACTIVATIONS[shape.activation],
            eps=eps,
            x=x.data_ptr(),
            out=out.data_ptr(),
            weight=weight.data_ptr(),
            bias=bias.data_ptr(),
            add=add.data_ptr(),
            partials=partials.data_ptr(),
        )
        if modulation is not None:
            args.scale, args.modulation_row = modulation.data_ptr(), 2 * shape.channels
            args.shift = args.scale + 2 * shape.channels

        def norm(x: Any, kind: Any, inner: Any) -> Any:
            """On x [N, rows, C]: sums in `inner`, everything else in `kind`."""
            y = (x.to(kind) + add.to(kind)).transpose(1, 2)
            y = functional.group_norm(y.to(inner), groups, weight.to(inner), bias.to(inner), eps).to(kind)
            if modulation is not None:
                scale, shift = modulation.to(kind).repeat_interleave(args.repeat, 0)[..., None].chunk(2, dim=1)
                y = y * (1 + scale) + shift
            return getattr(functional, shape.activation)(y).transpose(1, 2)

        def plain(x: Any) -> Any:
            return norm(x, half, torch.float32).contiguous()

        self.kernels.group_norm(args, self.stream)
        exact = norm(x, torch.float64, torch.float64)
        error = float((out.double() - exact).abs().max())  # NaN where nothing was written
        naive = float((plain(x).double() - exact).abs().max())
        del exact
        torch._dynamo.reset()
        compiled = torch.compile(plain, dynamic=False)
        return Row(
            kernel="group norm",
            shape=str(shape),
            bytes=shape.bytes,
            error=error,
            budget=2 * naive + torch.finfo(half).eps / 2,
            ours=self.time(lambda: self.kernels.group_norm(args, self.stream)),
            copy=self.copy(shape.bytes),
            others={"torch": self.try_to_time(lambda: plain(x)), "compiled": self.try_to_time(lambda: compiled(x))},
        )

    # ---- Denoising step

    def step(self, stage: str) -> Row:
        torch = self.torch
        shape = STEP_SHAPES[stage]
        schedule = make_schedule(SchedulerConfig.from_dict(SCHEDULERS[stage], stage), 50)
        index, guidance_scale = 25, 7.0
        batch, channels, frames, height, width = shape
        pixels = height * width
        learned, ddpm = schedule.config.learned_variance, schedule.config.solver == "ddpm"
        random = np.random.default_rng(0)
        half = np.float16

        # Beyond the last row the kernel would do nothing.
        rows = self.warmup + self.repeats + 100
        table = np.repeat(step_table(schedule, guidance_scale)[index : index + 1], rows)
        if not ddpm:  # timed again and again, the sample stays about where it is
            table["sample_weight"][1:], table["x0_weight"][1:] = 1, -table["previous_x0_weight"][1:]
        # Quantiles of x0 between 1 and 1.5, so that they are counted for as long as it takes.
        clean, noise, away = (random.standard_normal(shape, np.float32) for _ in range(3))
        clean *= np.float32(0.6)
        # One host array per buffer: what the reference works on and what is uploaded.
        host: dict[str, np.ndarray] = {
            "table": table,
            "counter": np.array((0, rows, 0), COUNTER),
            "sample": schedule.divisor[index] * clean + schedule.pred_weight[index] * noise,
            "noise_pred": np.concatenate([noise + away, noise + away - away / guidance_scale]).astype(half),
            "network_input": np.zeros((2 * batch, *shape[1:]), half),
            "timesteps": np.zeros(2 * batch, np.float32),
        }
        if not ddpm:
            host["x0"] = random.standard_normal(shape, np.float32)
        if learned:
            host["variance_frac"] = random.uniform(-1, 1, shape).astype(half)
        if ddpm:
            host["noise"] = random.standard_normal((frames, channels, height, width), np.float32)
        device = {
            name: torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8).to(DEVICE)
            for name, array in host.items()
        }

        def args(pointers: Mapping[str, int]) -> DenoiseArgs:
            planes = (channels * frames * pixels, frames * pixels, pixels)  # [B, C, F, H, W]
            filled = DenoiseArgs(
                dtype=0, batch=batch, channels=channels, frames=frames, pixels=pixels, guided=1, **step_modes(schedule)
            )
            for name, pointer in pointers.items():
                if name == "noise":
                    setattr(filled, name, Planes(pointer, 0, pixels, channels * pixels))
                elif name in ("noise_pred", "variance_frac", "network_input"):
                    setattr(filled, name, Planes(pointer, *planes))
                else:
                    setattr(filled, name, pointer)
            return filled

        on_device = args({name: array.data_ptr() for name, array in device.items()})
        self.kernels.denoise_step(on_device, self.stream)
        self.references.denoise_step(args({name: array.ctypes.data for name, array in host.items()}))
        result = device["sample"].view(torch.float32).cpu().numpy().reshape(shape)
        error = float(np.abs(result - host["sample"]).max())

        read = ("noise_pred", "variance_frac", "sample", "x0", "noise")
        written = ("sample", "x0", "network_input")
        count = sum(host[name].nbytes for names in (read, written) for name in names if name in host)
        plain = self._plain_step(schedule, index, guidance_scale, shape, device)
        torch._dynamo.reset()
        return Row(
            kernel="denoising step",
            shape=f"{stage} {' x '.join(map(str, shape))}",
            bytes=count,
            error=error,
            budget=4e-6 if ddpm else 0.0,  # exp() may differ in its last bits
            ours=self.time(lambda: self.kernels.denoise_step(on_device, self.stream)),
            copy=self.copy(count),
            others={
                "torch": self.try_to_time(plain, graph=False),  # torch.quantile cannot be captured
                "compiled": self.try_to_time(torch.compile(plain, dynamic=False), graph=False),
            },
        )

    def _plain_step(
        self, schedule: Any, index: int, guidance_scale: float, shape: Sequence[int], device: Mapping[str, Any]
    ) -> Callable[[], Any]:
        """The step as torch code would have it: whole-tensor operations, coefficients as numbers."""
        torch, config = self.torch, schedule.config
        batch = shape[0]
        row = {name: float(getattr(schedule, name)[index]) for name in STEP.names[2:]}
        sample = device["sample"].view(torch.float32).reshape(shape)
        noise_pred = device["noise_pred"].view(torch.float16).reshape(2 * batch, *shape[1:])
        previous_x0 = device["x0"].view(torch.float32).reshape(shape) if "x0" in device else None
        noise = (
            device["noise"].view(torch.float32).reshape(shape[2], shape[1], *shape[3:]) if "noise" in device else None
        )
        frac = device["variance_frac"].view(torch.float16).reshape(shape) if "variance_frac" in device else None

        def plain() -> Any:
            negative, positive = noise_pred.float().chunk(2)
            pred = negative + guidance_scale * (positive - negative)
            x0 = (sample - row["pred_weight"] * pred) / row["divisor"]
            if config.thresholding:
                by_frame = x0.transpose(1, 2).flatten(2).abs()
                s = torch.quantile(by_frame, config.dynamic_thresholding_ratio, dim=2)
                s = s.clamp(1, config.sample_max_value)[:, None, :, None, None]
                x0 = x0.clamp(-s, s) / s
            x = row["sample_weight"] * sample + row["x0_weight"] * x0
            if previous_x0 is not None:
                x = x + row["previous_x0_weight"] * previous_x0
            if noise is not None:
                share = (frac.float() + 1) / 2
                log_var = share * row["max_log_var"] + (1 - share) * row["min_log_var"]
                x = x + torch.exp(log_var / 2) * noise.transpose(0, 1)
            return x, x0, torch.cat([x, x]).half()

        return plain

    def rows(self) -> Iterator[Row]:
        """Every kernel at every shape, wrong results too: a row says whether it is right."""
        for attended in ATTENTION_SHAPES:
            for first in (True, False):
                yield self.attention(attended, first)
        yield from map(self.norm, NORM_SHAPES)
        yield from map(self.step, STEP_SHAPES)


def run_kernels(torch: Any, architectures: str, warmup: int, repeats: int, save: Callable[[Content], None]) -> Content:
    """Build, check and time all; `save` is called after every row. Raises EngineError at the end if any was wrong."""
    bench = KernelBench(torch, *build_kernels(architectures), warmup, repeats)
    large_copy = COPY_BYTES / bench.copy(COPY_BYTES).median
    rows: list[Row] = []

    def content() -> Content:
        return to_json(rows, large_copy), [table(rows, large_copy)], {"bandwidth": plot(rows, large_copy)}

    for row in bench.rows():
        rows.append(row)
        ratio = share(row.copy.median, row.ours.median)
        wrong = "" if row.right else f", WRONG by {row.error:.3g}, allowed {row.budget:.3g}"
        print(f"{row.kernel}: {row.shape}: {ratio} of copy{wrong}", file=sys.stderr, flush=True)
        save(content())
    if wrong := [f"{row.kernel}, {row.shape}, by {row.error:.3g}" for row in rows if not row.right]:
        raise EngineError(f"{len(wrong)} of {len(rows)} results are wrong: {'; '.join(wrong)}.")
    return content()


def table(rows: Sequence[Row], large_copy: float) -> Table:
    """`large_copy` is the bandwidth of the large copy, B/s."""
    names = ("SDPA", "torch", "compiled", "xformers")
    headers = ["shape", "right", "us", "p10-p90", "GB/s", "of copy", "of large copy"]
    headers += [f"{name} / ours" for name in names]
    lines = []
    for row in rows:
        bandwidth = row.bytes / row.ours.median
        ratios = [
            number(other.median / row.ours.median) if (other := row.others.get(name)) else NOTHING for name in names
        ]
        lines.append(
            [
                f"{row.kernel}: {row.shape}",
                "yes" if row.right else "NO",
                median(row.ours, 1e6),
                spread(row.ours, 1e6),
                number(bandwidth / 1e9),
                share(row.copy.median, row.ours.median),
                share(bandwidth, large_copy),
                *ratios,
            ]
        )
    return Table(
        f"Kernels: median of {rows[0].ours.n} calls; large copy {number(large_copy / 1e9)} GB/s", headers, lines
    )


def plot(rows: Sequence[Row], large_copy: float) -> Chart:
    """The roofline of kernels that are all bound by memory: bandwidth over bytes moved, below that of a copy."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row.kernel, []).append((row.bytes / 1e6, row.bytes / row.ours.median / 1e9))
    copies = sorted({(row.bytes / 1e6, row.bytes / row.copy.median / 1e9) for row in rows})
    lines = {"copy of as many bytes": [*copies, (COPY_BYTES / 1e6, large_copy / 1e9)]}
    return Chart("Kernels: bandwidth", Axis("MB moved", log=True), Axis("GB/s"), lines, points)


def to_json(rows: Sequence[Row], large_copy: float) -> dict[str, Any]:
    """Seconds and bytes."""
    return {
        "large_copy_bytes_per_s": round(large_copy),
        "kernels": [{**asdict(row), "right": row.right} for row in rows],
    }
