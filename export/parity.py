"""Does the compiled graph compute what the torch module computes? Asked of every graph before it is installed."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from engines.errors import ParityError
from engines.spec import Axis, GraphSpec
from export.networks import Graph
from runtime.runner import open_runner

SEED = 20230927  # arXiv 2309.15818's day
# Relative to the largest value of the reference. float32: summation order. float16: a few units of its last place,
# through hundreds of layers.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2}


def example_sizes(spec: GraphSpec) -> dict[str, int]:
    """Sizes to trace with: none is 1, and no two are equal, lest tracing takes one axis for another."""
    return _sizes(spec, {"batch": 2, "frames": 3, "tokens": 7}, (4, 6))


def parity_sizes(spec: GraphSpec) -> list[dict[str, int]]:
    """Sizes to compare at: two batch sizes and two frame counts, none of them traced. Batch 1 is a classic trap."""
    return [
        _sizes(spec, {"batch": 1, "frames": 2, "tokens": 5}, (3, 2)),
        _sizes(spec, {"batch": 4, "frames": 5, "tokens": 9}, (2, 3)),
    ]


def _sizes(spec: GraphSpec, wanted: Mapping[str, int], pixels: tuple[int, int]) -> dict[str, int]:
    profile = next(iter(spec.profiles.values()))

    def clamp(axis: Axis, size: int) -> int:
        return min(max(size, axis.min), axis.max)

    sizes = {axis: clamp(profile[axis], size) for axis, size in wanted.items() if axis in profile}
    for axis, units in zip(("height", "width"), pixels, strict=True):
        if axis in profile:
            sizes[axis] = clamp(profile[axis], max(units, 2) * max(profile[axis].min // 2, profile[axis].multiple))
    return sizes


def check_parity(graph: Graph, engine: str, backend: str, plan: Path, precision: str) -> list[dict[str, float]]:
    """Compare on seeded inputs; returns a row per size. Raises ParityError with the numbers when one is off."""
    rows = []
    runner = open_runner(backend, plan)
    try:
        for sizes in parity_sizes(graph.spec):
            inputs = graph.example(sizes, torch.Generator().manual_seed(SEED))
            with torch.no_grad():
                outputs = graph.module(*inputs)
            references = [t.float().numpy() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]
            feeds = {b.name: t.numpy() for b, t in zip(graph.spec.inputs, inputs, strict=True)}
            actual = runner.infer(feeds)
            errors = [
                np.abs(actual[b.name].astype(np.float32) - reference)
                for b, reference in zip(graph.spec.outputs, references, strict=True)
            ]
            largest = max(float(np.abs(reference).max()) for reference in references)
            row = {
                **sizes,
                "max_error": max(float(error.max()) for error in errors),
                "mean_error": max(float(error.mean()) for error in errors),
                "max_value": largest,
                "tolerance": TOLERANCE[precision] * max(largest, 1.0),
            }
            if not row["max_error"] <= row["tolerance"]:  # NaN fails too
                raise ParityError(
                    f"{engine}/{graph.spec.name}: the compiled graph differs from its torch module by "
                    f"{row['max_error']:.3g} (tolerance {row['tolerance']:.3g}) at {sizes}. It was not installed."
                )
            rows.append(row)
    finally:
        runner.close()
    return rows
