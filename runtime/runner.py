"""What runs one loaded plan: the interface that every backend has, and what some can do besides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from engines.errors import BundleError, EngineError, Show1Error
from engines.memory import is_short_of_memory
from runtime.schedulers import Schedule

Array = NDArray[Any]


class Runner(Protocol):
    """One loaded plan. `infer` takes and gives arrays in the bindings' own types; by default all outputs.

    One with a number `positions_at_once` should not get more frames x pixels in a call, of several samples.
    """

    def infer(self, feeds: Mapping[str, Array], wanted: Sequence[str] | None = None) -> dict[str, Array]: ...

    def close(self) -> None: ...


class Loop(Protocol):
    """A denoising loop whose arrays stay where the network is. Every call of `step` is one step of its schedule."""

    def step(self, noise: Array | None) -> None:
        """Network and solver; `noise` [F, C, H, W] where the step adds some."""

    def sample(self) -> Array:
        """float32 [B, C, F, H, W] as it stands, in memory that the next step may overwrite."""


@dataclass(frozen=True)
class LoopStart:
    """What a denoising loop of N steps starts from, with the meaning that it has in `sampler.denoise`."""

    x: Array  # float32 [B, C, F, H, W]
    schedule: Schedule
    guidance: Array  # float32 [N], the scale of each step: `sampler.guidance_scales`
    whole: Array  # bool [N], whether a step runs the whole network or `shallow`: `sampler.whole_steps`
    condition: Array | None  # float32 [B, K, F, H, W]


@runtime_checkable
class LoopRunner(Protocol):
    """A runner of a UNet's step that can run the loop itself.

    `context` has the network's inputs besides sample and timestep, in the bindings' types; `dtype` is that of the
    network's input.
    """

    def start_loop(
        self, shallow: Runner | None, start: LoopStart, context: Mapping[str, Array], dtype: str
    ) -> Loop: ...


def first_line(error: Exception) -> str:
    """What an error of a library says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_error(plan: Path, library: str, error: Exception) -> Show1Error:
    """What it means that a library did not load a plan: it cannot be read, or memory is short."""
    text = first_line(error)
    if is_short_of_memory(error):
        return EngineError(f"{plan}: too little memory to load it ({text}). Close what else uses it, or the GPU.")
    return BundleError(f"{plan}: {library} cannot load it ({text}).")
