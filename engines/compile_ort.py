"""ONNX Runtime's compiler: the graph itself, with the operators that its kernels do best, and its weights beside it."""

from pathlib import Path

import onnx_ir as ir

from engines.passes import fuse_spatial_attention, split_group_norm, unsigned_activations

BACKEND = "onnxruntime"


def compile_ort(model: ir.Model, plan: Path, weights: Path) -> None:
    """Write `plan` (ONNX) and `weights` beside it, ready for an ONNX Runtime session on any of its providers."""
    fuse_spatial_attention(model.graph)
    split_group_norm(model.graph)
    ir.save(model, plan, external_data=weights.name)


def compile_int8(model: ir.Model, plan: Path, weights: Path) -> None:
    """The same for a graph that `compile_ort` made and `quantize` has rewritten since."""
    unsigned_activations(model.graph)
    ir.save(model, plan, external_data=weights.name)
