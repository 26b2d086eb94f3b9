"""What a compiled network looks like from outside: bindings, axes, profile, graphs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from engines.errors import ProfileError

# What weights and activations are -> what the bindings are. NumPy has no bfloat16: those graphs cast at their borders.
PRECISIONS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "float32"}
INT8 = "int8"  # what `engines.quantize` makes of a graph of one of these
WEIGHT_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Axis:
    """Smallest, tuned-for and largest size of a dynamic axis; every size is a multiple of `multiple`."""

    min: int
    opt: int
    max: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.min <= self.opt <= self.max) or any(n % self.multiple for n in (self.min, self.opt, self.max)):
            raise ValueError(f"not a range: {self}")

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max and size % self.multiple == 0

    def nearest(self, size: int) -> int:
        """`size`, or the end of the range that lies nearer."""
        return min(max(size, self.min), self.max)

    def narrowed(self) -> "Axis":
        """At most twice the size tuned for."""
        return Axis(self.min, self.opt, min(self.max, 2 * self.opt), self.multiple)

    def __str__(self) -> str:
        return f"{self.min}..{self.max}" + (f" in steps of {self.multiple}" if self.multiple > 1 else "")


@dataclass(frozen=True)
class Binding:
    """A named input or output. `axes` holds sizes, axis names ("frames") and, in outputs, derived ones ("height/8")."""

    name: str
    dtype: str  # NumPy's name
    axes: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph of an engine. `profile` has the range of every dynamic axis."""

    name: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    profile: Mapping[str, Axis]

    def narrowed(self) -> "GraphSpec":
        """For compilers whose plans reserve memory for, and choose kernels by, the largest size."""
        return replace(self, profile={axis: limits.narrowed() for axis, limits in self.profile.items()})

    def check(self, engine: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ProfileError unless the inputs' shapes agree with each other and with the profile."""
        sizes: dict[str, int] = {}
        for binding in self.inputs:
            shape = shapes.get(binding.name)
            if shape is None:
                raise ProfileError(f"{engine}/{self.name}: input {binding.name} is missing.")
            fits = len(shape) == len(binding.axes) and all(
                size == axis if isinstance(axis, int) else sizes.setdefault(axis, size) == size
                for axis, size in zip(binding.axes, shape, strict=True)
            )
            if not fits:
                want = ", ".join(map(str, binding.axes))
                known = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
                raise ProfileError(
                    f"{engine}/{self.name}: {binding.name} has shape {shape}, wanted [{want}] ({known})."
                )
        self.check_sizes(engine, sizes)

    def samples_at_once(self, **sizes: int) -> int:
        """How many samples of these sizes take no more memory than the batch that is tuned for; one at least."""
        tuned = math.prod(self.profile[axis].opt for axis in ("batch", *sizes))
        return max(1, tuned // math.prod(sizes.values()))

    def check_sizes(self, engine: str, sizes: Mapping[str, int]) -> None:
        """Raises ProfileError unless the profile takes these sizes of its axes, some or all of them."""
        wrong = [
            f"{axis} {size} (built for {self.profile[axis]})"
            for axis, size in sizes.items()
            if size not in self.profile[axis]
        ]
        if wrong:
            raise ProfileError(
                f"{engine}/{self.name}: {', '.join(wrong)}. Ask for a size and a number of frames that fit."
            )
