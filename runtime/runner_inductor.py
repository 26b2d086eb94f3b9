"""Packages of AOTInductor on torch, and the denoising loop on their device. The one module of the runtime with torch.

A package holds machine code for one kind of device, and the weights. On CUDA a whole denoising step, network and
solver, is one CUDA graph, and between the first step and the last nothing crosses the bus but noise (DDPM) and, where
someone follows the steps, the sample.
"""

import contextlib
import gc
import os
import platform
import shlex
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engines.catalog import DEEP
from engines.errors import EngineError, Show1Error, install
from engines.gpu import TURING, Gpu, find_gpus, old_driver
from engines.limits import available_memory, processors
from engines.manifest import EngineEntry
from engines.store import Bundle
from runtime.kernels import (
    ABI,
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
    find_library,
    step_modes,
    step_table,
)
from runtime.runner import Array, LoopStart, first_line, load_error

try:
    import torch
    from torch import Tensor
except (ImportError, OSError) as error:  # OSError: its libraries do not load
    raise EngineError(
        f"torch is not usable ({error}), and engines of inductor run on it: {install('inductor')}."
    ) from None

# What the kernels take; beyond it attention over frames is torch's own.
_MAX_FRAMES, _MAX_HEAD_DIM, _MAX_ELEMENTS = 64, 128, 2**31 - 1
BINDINGS = ("show1_inputs", "show1_outputs")  # keys of a package's metadata: the bindings' names, in order
_LOOPS = 2  # kept by a runner: sr1's shorter last window is a second shape
_LOADING = threading.Lock()  # packages are unpacked where an environment variable says, which all threads share
_WARM_UPS = 3  # runs before a CUDA graph is captured: libraries allocate and choose in their first ones
X86_LEVEL = "x86-64-v3"  # AVX2; the heavy operators are oneDNN's, which looks at the processor when it runs


def torch_version() -> str:
    """Without the suffix that says what it was built for: packages for the CPU run on either build."""
    return torch.__version__.partition("+")[0]


def target() -> str:
    """What packages are compiled for on this machine: sm90 for a GPU, else cpu- and the least its processor must do."""
    if torch.cuda.is_available():
        return "sm{}{}".format(*torch.cuda.get_device_capability())
    return f"cpu-{cpu_level()}"


def why_idle(gpu: Gpu) -> str | None:
    """Why torch leaves a card of this machine idle, with what mends it, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "torch here leaves the GPU idle: install its CUDA build, as pytorch.org says"
    major, minor = map(int, torch.version.cuda.split(".")[:2])
    return old_driver(gpu, "torch's CUDA build", (major, minor)) or "torch does not find the GPU"


def cpu_level() -> str:
    """An x86-64 level where the processor has AVX2; elsewhere its family, of ARM with the width of its vectors."""
    capability, machine = torch.backends.cpu.get_cpu_capability(), platform.machine().lower()
    if capability.startswith("AVX"):
        return X86_LEVEL
    return f"{machine}-{capability.lower()}" if capability.startswith("SVE") else machine


def set_up_cuda() -> None:
    """What torch's own operators do, here and where packages are timed."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    torch.backends.cudnn.benchmark = True  # the fastest algorithm for every shape, found at its first run


def why_unusable(bundle: Bundle, entry: EngineEntry) -> str | None:
    """Why packages cannot run here, told from the manifest alone and with what mends it; None if they can."""
    (built_for,), here = entry.targets, target()
    if built_for not in (here, f"cpu-{cpu_level()}"):
        if entry.needs_gpu and (gpus := find_gpus()) and (reason := why_idle(gpus[0])):
            return reason
        changes = {"precision": "fp16"} if here == TURING and entry.precision == "bf16" else {}
        return f"built for {built_for}, this machine is {here}: {bundle.rebuild_command(entry.name, **changes)}"
    if reason := version_mismatch(bundle, entry):
        return reason
    # Layers over time and the solver are our kernels, and in half precision every group norm.
    if "step" not in entry.graphs and not (entry.name.startswith("vae") and entry.precision != "fp32"):
        return None
    if entry.properties.get("kernels") != ABI:
        return f"built for another version's kernels: {bundle.rebuild_command(entry.name)}"
    return why_no_kernels("cuda" if entry.needs_gpu else "cpu")


def why_no_kernels(device: str) -> str | None:
    """Why packages cannot run on "cuda" or "cpu" for want of a library of kernels."""
    try:
        _kernels(device)
    except EngineError as error:
        return str(error).removesuffix(".")
    return None


def version_mismatch(bundle: Bundle, entry: EngineEntry) -> str | None:
    """Packages call into torch, whose insides are no two versions' the same."""
    if entry.backend_version == torch_version():
        return None
    return (
        f"built by torch {entry.backend_version}, {torch_version()} is installed: "
        f"`pip install {shlex.quote(f'torch=={entry.backend_version}')}`, or {bundle.rebuild_command(entry.name)}"
    )


@cache
def _kernels(device: str) -> Kernels:
    library, suffix = (CUDA, "") if device == "cuda" else (REFERENCE, "_ref")
    return Kernels(find_library(library), suffix)


def _stream(device: str) -> int | None:
    return torch.cuda.current_stream().cuda_stream if device == "cuda" else None


@cache
def _warm_up_stream() -> "torch.cuda.Stream":
    """One for what runs before captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A capture that the garbage collector does not end, by freeing a graph that nobody uses any more."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@torch.library.custom_op("show1_kernels::temporal_attention", mutates_args=())
def temporal_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of each pixel over the frames, by our kernel (kernels/include/show1/temporal_attention.h).

    q, k and v [B, F, P, heads * d], float16 or bfloat16, each with strides of its own -> the same shape, contiguous.
    """
    batch, frames, pixels, channels = q.shape
    head_dim = channels // num_heads
    if any(x.shape != q.shape or x.dtype != q.dtype for x in (k, v)):
        raise EngineError("temporal attention: q, k and v are of different shapes or types.")
    if frames > _MAX_FRAMES or head_dim > _MAX_HEAD_DIM or q.numel() > _MAX_ELEMENTS:
        return plain_temporal_attention(q, k, v, num_heads).contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    heads = [_heads(x, head_dim) for x in (q, k, v, out)]
    device = q.device.type
    _kernels(device).temporal_attention(
        str(q.dtype).removeprefix("torch."),
        *heads,
        batch=batch,
        frames=frames,
        pixels=pixels,
        heads=num_heads,
        head_dim=head_dim,
        stream=_stream(device),
    )
    return out


@temporal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _heads(x: Tensor, head_dim: int) -> Heads:
    _check_channels("temporal attention", x)
    return Heads(x.data_ptr(), *x.stride()[:3], head_dim)


def _check_channels(what: str, x: Tensor) -> None:
    """The kernels read the last axis side by side."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise EngineError(f"{what}: channels {x.stride(-1)} elements apart; wanted side by side.")


def plain_temporal_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """The same in any precision, by matrix products: fused kernels have room for 65,535 rows, here one per pixel."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1, 4) for x in (q, k, v))  # [B, P, heads, F, d]
    scale = q.shape[-1] ** -0.25  # on either side, lest products leave the range of float16
    weights = ((q * scale) @ (k * scale).transpose(-1, -2)).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2, 4).flatten(3)


@torch.library.custom_op("show1_kernels::group_norm", mutates_args=())
def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str,
    frames: int,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """Group normalisation with what stands around it, by our kernel (kernels/include/show1/group_norm.h).

    x [B * frames, C, ..], float16 or bfloat16, is read in place if channels are innermost -> the same, channels
    innermost. Statistics are of `frames` rows of the batch together. `add`, `scale` and `shift` have one row of
    channels, or M each: one for B / M clips. `activation` is one of `runtime.kernels.ACTIVATIONS`.
    """
    pixels = x.movedim(1, -1).contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    out = torch.empty(pixels.shape, dtype=x.dtype, device=x.device)
    batch, channels = len(x) // frames, x.shape[1]
    partials = torch.empty(batch * NORM_PARTS * num_groups * 2, dtype=torch.float32, device=x.device)
    around = {name: tensor for name, tensor in (("add", add), ("scale", scale), ("shift", shift)) if tensor is not None}
    rows = {len(tensor) for tensor in around.values()} - {1}
    other_channels = any(tensor.shape[-1] != channels for tensor in (weight, bias, *around.values()))
    if len(x) % frames or other_channels or len(rows) > 1 or any(batch % count for count in rows):
        shapes = {name: tuple(tensor.shape) for name, tensor in around.items()}
        raise EngineError(
            f"group norm: {len(x)} rows of {frames} frames and {channels} channels and {shapes} do not fit together."
        )
    if any(tensor.dtype != x.dtype for tensor in (weight, bias, *around.values())):
        raise EngineError("group norm: tensors of different types.")
    args = GroupNormArgs(
        dtype=DTYPES[str(x.dtype).removeprefix("torch.")],
        batch=batch,
        rows=x.numel() // (batch * channels),
        channels=channels,
        groups=num_groups,
        repeat=batch // max(rows, default=1),
        activation=ACTIVATIONS[activation],
        eps=eps,
        x=pixels.data_ptr(),
        out=out.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        partials=partials.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in around.items()},
    )
    if add is not None:
        args.add_row = _row(add)
    if scale is not None and shift is not None:
        args.modulation_row = _row(scale)
        if _row(shift) != args.modulation_row:
            raise EngineError("group norm: scale and shift lie in memory in different ways.")
    device = x.device.type
    _kernels(device).group_norm(args, _stream(device))
    return out.movedim(-1, 1)


@group_norm.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    pixels = x.movedim(1, -1)
    return torch.empty(pixels.shape, dtype=x.dtype, device=x.device).movedim(-1, 1)


def _row(x: Tensor) -> int:
    """Elements between rows of [M, C], whose channels are side by side; 0 where all read the one there is."""
    _check_channels("group norm", x)
    return x.stride(0) if len(x) > 1 else 0


class InductorRunner:
    """One package. `infer` takes and gives NumPy arrays; on the CPU they are not copied."""

    def __init__(self, plan: Path):
        _check_room(plan)
        # torch unpacks it there, reads kernels from there at their first launch, and leaves all where loading fails.
        self._unpacked = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        try:
            # What torch's own function ends in, less its questions to a compiler and a second try with what failed. On
            # the caller's thread and stream alone (True), one runner: what a CUDA graph can capture.
            with _LOADING, _temporary_files_in(self._unpacked.name):
                self._package = torch._C._aoti.AOTIModelPackageLoader(str(plan), "model", True, 1, -1)
            metadata = self._package.get_metadata()
            self.inputs, self._outputs = (metadata[key].split() for key in BINDINGS)
        except Exception as error:  # its exceptions share no base class
            self._unpacked.cleanup()
            if torch.cuda.is_initialized():
                with contextlib.suppress(RuntimeError):  # CUDA's last error, which would be the next launch's
                    torch.ones(1, device="cuda")
            # torch says only what call has failed.
            reason = MemoryError(first_line(error)) if _is_too_large(plan) else error
            raise load_error(plan, f"torch {torch.__version__}", reason) from None
        self.device = metadata["AOTI_DEVICE_KEY"]
        if self.device == "cuda":
            set_up_cuda()
        else:  # torch does not know of a container's quota of processors
            torch.set_num_threads(min(torch.get_num_threads(), processors()))
        self._loops: dict[_Layout, DeviceLoop] = {}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous tensors on the device, in and out; outputs may be views."""
        outputs = self._package.boxed_run([feeds[name] for name in self.inputs])
        return dict(zip(self._outputs, outputs, strict=True))

    def infer(self, feeds: Mapping[str, Array], wanted: Sequence[str] | None = None) -> dict[str, Array]:
        with _failures():
            outputs = self.run({name: _from_numpy(array).to(self.device) for name, array in feeds.items()})
            return {name: outputs[name].cpu().numpy() for name in wanted or self._outputs}

    def start_loop(
        self, shallow: "InductorRunner | None", start: LoopStart, context: Mapping[str, Array], dtype: str
    ) -> "DeviceLoop":
        """A loop at its first step: see `runtime.runner.LoopRunner`.

        A loop's buffers, and on CUDA its graphs, serve later ones of the same shapes, while they are the last `_LOOPS`.
        """
        schedule = start.schedule
        kinds = [Kind(bool(scale > 1), bool(whole)) for scale, whole in zip(start.guidance, start.whole, strict=True)]
        layout = _Layout(
            shape=start.x.shape,
            dtype=dtype,
            condition_channels=0 if start.condition is None else start.condition.shape[1],
            kinds=tuple(sorted(set(kinds), reverse=True)),
            adds_noise=any(map(schedule.adds_noise, range(len(schedule)))),
            modes=tuple(step_modes(schedule).items()),
            steps=schedule.config.num_train_timesteps,
            context=tuple((name, array.shape, array.dtype.name) for name, array in context.items()),
        )
        loop = self._loops.pop(layout, None)
        with _failures():
            if loop is None:
                if len(self._loops) == _LOOPS:
                    self._loops.pop(next(iter(self._loops))).close()  # the one not used for longest
                loop = DeviceLoop(self, shallow, layout)
            try:
                loop.start(start, kinds, context)
            except BaseException:
                loop.close()  # else its graphs would outlive the package, held by the traceback
                raise
        self._loops[layout] = loop
        return loop

    def close(self) -> None:
        if self.device == "cuda":
            with contextlib.suppress(RuntimeError):  # of a card that is lost, which what has failed there has told
                torch.cuda.synchronize()  # a step may be under way, after Ctrl-C
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()
        del self._package
        self._unpacked.cleanup()
        if self.device == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def _check_room(plan: Path) -> None:
    """torch unpacks packages into the temporary folder, and leaves there what it had when the disk is full."""
    folder, need = tempfile.gettempdir(), plan.stat().st_size if plan.is_file() else 0
    free = shutil.disk_usage(folder).free
    if need > free:
        raise EngineError(
            f"{plan}: to load it {need / 1e9:.3g} GB are needed in {folder}, {free / 1e9:.3g} GB are free. "
            "Make room, or let TMPDIR name another folder."
        )


def _is_too_large(plan: Path) -> bool:
    """A whole package, for the memory that is free where it is to lie."""
    try:
        with zipfile.ZipFile(plan) as package:
            for_card = any(name.endswith(".cubin") for name in package.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # a damaged one
        return False
    free = available_memory()
    if for_card and torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # of a card that is lost
            free = torch.cuda.mem_get_info()[0]
    return plan.stat().st_size > free


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Of torch's C++ part, on Linux and macOS."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """torch's errors as EngineError: of memory, of launches, and of earlier ones that a copy brings to light."""
    try:
        yield
    except Show1Error:
        raise
    except Exception as error:  # its exceptions share no base class
        raise EngineError(f"inductor failed: {first_line(error)}") from None


def _from_numpy(array: Array) -> Tensor:
    """The array's own memory where torch can share it: packages take contiguous inputs."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class Kind(NamedTuple):
    """What steps have in common that run the same network on the same batch."""

    guided: bool
    whole: bool


@dataclass(frozen=True)
class _Layout:
    """What a loop's buffers and its CUDA graph are made for."""

    shape: tuple[int, ...]  # of the sample, [B, C, F, H, W]
    dtype: str  # of the network's input
    condition_channels: int
    kinds: tuple[Kind, ...]  # of the steps, each once, whole ones before shallow ones
    adds_noise: bool
    modes: tuple[tuple[str, int | float], ...]
    steps: int  # at most
    context: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, NumPy's dtype


class _Buffers:
    """What lasts from step to step on the device, whatever their kind."""

    def __init__(self, runner: InductorRunner, layout: _Layout):
        self.deep: dict[bool, Tensor] = {}  # guided -> what the last whole step of that batch kept
        self.pool: Any = None  # of the graphs' memory: one runs at a time, and what outlasts it lies here
        _, channels, frames, height, width = layout.shape
        self.runner, self.layout = runner, layout
        self.kernels = _kernels(runner.device)
        self.table = self.zeros((STEP.itemsize * layout.steps,), "uint8")
        self.counter = self.zeros((COUNTER.itemsize,), "uint8")
        self.sample = self.zeros(layout.shape)
        self.x0 = self.zeros(layout.shape)
        # The reference draws with frames as the batch; clips share each draw.
        self.noise = self.zeros((frames, channels, height, width)) if layout.adds_noise else None

    def zeros(self, shape: Sequence[int], dtype: str = "float32") -> Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.runner.device)

    def rewind(self, x: Array, table: Array) -> None:
        """Load sample [B, C, F, H, W] and schedule, and go to the first step."""
        counter = np.array([(0, len(table), 0)], COUNTER)
        for buffer, array in ((self.table, table), (self.counter, counter)):
            raw = array.view(np.uint8)
            buffer[: raw.size].copy_(torch.from_numpy(raw))
        self.sample.copy_(_from_numpy(x))


class DeviceLoop:
    """The denoising loop where the network is: sample, x0, the network's input and the prompt stay there.

    The solver's step is the kernel `denoise_step`, or on the CPU its reference: the meaning is that of
    `runtime.sampler`. It reads the step's coefficients from a table by a counter that it advances itself, so that on
    CUDA network and solver are captured once and replayed for every step of every run; where only a part of the steps
    is guided or whole, once for every kind.
    """

    def __init__(self, runner: InductorRunner, shallow: InductorRunner | None, layout: _Layout):
        self._buffers = _Buffers(runner, layout)
        self._steps: dict[Kind, _Step] = {}
        for kind in layout.kinds:  # a whole step comes before the shallow ones that read what it keeps
            network = runner if kind.whole or shallow is None else shallow
            self._steps[kind] = _Step(self._buffers, network, kind)
        self._current: _Step | None = None
        self._index = 0
        self._host = self._buffers.sample  # where `sample` shows the result
        if runner.device == "cuda":
            self._host = torch.empty(layout.shape, pin_memory=True)

    def start(self, start: LoopStart, kinds: Sequence[Kind], context: Mapping[str, Array]) -> None:
        """Load sample, schedule, condition and prompt, and go to the first step."""
        table, steps = step_table(start.schedule, start.guidance), self._steps.values()
        for step in steps:
            step.load(start.condition, context)
        if self._buffers.runner.device == "cuda" and not all(step.captured for step in steps):
            for step in steps:  # all of them first: they cannot use the memory that a graph keeps
                self._buffers.rewind(start.x, table)
                step.enter(float(table["timestep"][0]))
                step.warm_up()
            for step in steps:
                step.capture()
        self._buffers.rewind(start.x, table)
        self._table, self._kinds, self._index, self._current = table, kinds, 0, None

    def step(self, noise: Array | None) -> None:
        buffers, row = self._buffers, self._table[self._index]
        step = self._steps[self._kinds[self._index]]
        with _failures():
            if noise is not None and buffers.noise is not None:
                buffers.noise.copy_(torch.from_numpy(noise))
            if step is not self._current:  # the first, or the one before wrote the other kind's input
                step.enter(float(row["timestep"]))
            step.run()
        self._current, self._index = step, self._index + 1

    def sample(self) -> Array:
        if self._host is not self._buffers.sample:
            with _failures():
                self._host.copy_(self._buffers.sample)
        return self._host.numpy()

    def close(self) -> None:
        """Drop the graphs, which hold kernels of the packages, whoever still holds the loop."""
        for step in self._steps.values():
            step.drop()


class _Step:
    """Network and solver, once, on inputs of its own: 2B clips where guided, else the prompt's B. On CUDA a graph.

    The solver writes the sample and timestep of a next step of the same kind; `enter` does for the first.
    """

    def __init__(self, buffers: _Buffers, network: InductorRunner, kind: Kind):
        layout = buffers.layout
        batch, self._channels, frames, height, width = layout.shape
        self._buffers, self._network, self._kind = buffers, network, kind
        self._keeps = kind.whole and Kind(kind.guided, whole=False) in layout.kinds
        self._batch = batch * (2 if kind.guided else 1)
        network_input = (self._batch, self._channels + layout.condition_channels, frames, height, width)
        self._feeds = {
            "sample": buffers.zeros(network_input, layout.dtype),
            "timestep": buffers.zeros((self._batch,)),
            **{
                name: buffers.zeros((self._batch, *shape[1:]), dtype)
                for name, shape, dtype in layout.context
                if name in network.inputs
            },
        }
        self._halves = self._feeds["sample"].unflatten(0, (-1, batch))  # [1 or 2, B, C + K, F, H, W]
        self._args = DenoiseArgs(
            dtype=DTYPES[layout.dtype],
            batch=batch,
            channels=self._channels,
            frames=frames,
            pixels=height * width,
            guided=kind.guided,
            table=buffers.table.data_ptr(),
            counter=buffers.counter.data_ptr(),
            sample=buffers.sample.data_ptr(),
            x0=buffers.x0.data_ptr(),
            network_input=_planes(self._feeds["sample"]),
            timesteps=self._feeds["timestep"].data_ptr(),
            **dict(layout.modes),
        )
        if buffers.noise is not None:
            frame, channel, _, _ = buffers.noise.stride()
            self._args.noise = Planes(buffers.noise.data_ptr(), 0, channel, frame)
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def load(self, condition: Array | None, context: Mapping[str, Array]) -> None:
        if condition is not None:
            self._halves[:, :, self._channels :] = _from_numpy(condition).to(self._halves.device)
        for name in self._feeds.keys() & context.keys():
            self._feeds[name].copy_(_from_numpy(context[name][-self._batch :]))  # the prompt's are the last

    def enter(self, timestep: float) -> None:
        """Go on from the sample as it is, at a step with this timestep."""
        self._halves[:, :, : self._channels] = self._buffers.sample
        self._feeds["timestep"].fill_(timestep)

    def warm_up(self) -> None:
        """What libraries do in their first calls, a capture does not bear. The buffers are spoilt afterwards."""
        stream = _warm_up_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._enqueue()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self) -> None:
        self._graph = graph = torch.cuda.CUDAGraph()  # `drop` knows it, too, where the capture fails
        # torch frees a stream's cuBLAS workspace with any graph captured there: each gets one in its own memory.
        torch._C._cuda_clearCublasWorkspaces()
        with _uninterrupted(), torch.cuda.graph(graph, pool=self._buffers.pool):
            self._enqueue()
        self._buffers.pool = graph.pool()

    def drop(self) -> None:
        if self._graph is not None:
            self._graph.reset()
            self._graph = None

    def run(self) -> None:
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.replay()

    def _enqueue(self) -> None:
        buffers = self._buffers
        feeds = self._feeds if self._kind.whole else {**self._feeds, DEEP: buffers.deep[self._kind.guided]}
        outputs = self._network.run(feeds)
        if self._keeps:
            if self._kind.guided not in buffers.deep:  # before a capture
                buffers.deep[self._kind.guided] = torch.empty_like(outputs[DEEP], memory_format=torch.contiguous_format)
            buffers.deep[self._kind.guided].copy_(outputs[DEEP])
        outputs = {name: _with_planes(x) for name, x in outputs.items() if name != DEEP}
        self._args.noise_pred = _planes(outputs["noise_pred"])
        if self._args.variance:
            # The guided variance is the prompt's, the last B of the network's batch.
            self._args.variance_frac = _planes(outputs["variance_frac"][-len(buffers.sample) :])
        buffers.kernels.denoise_step(self._args, _stream(buffers.runner.device))


def _with_planes(x: Tensor) -> Tensor:
    """[B, C, F, H, W] with the pixels of a plane side by side: as it is, or a copy."""
    return x if x[0, 0, 0].is_contiguous() else x.contiguous()


def _planes(x: Tensor) -> Planes:
    return Planes(x.data_ptr(), *x.stride()[:3])
