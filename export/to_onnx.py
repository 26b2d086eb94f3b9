"""Tracing: a torch module and its contract become an ONNX model with dynamic axes."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset23 as op
from torch import Tensor, nn

import export.modules.ops  # noqa: F401 (registers the operators translated here)
from engines.errors import ParityError
from engines.spec import GraphSpec

OPSET = 23  # the first with Attention


def _attention(q, k, v, num_heads):  # type: ignore[no-untyped-def]
    return op.Attention(q, k, v, q_num_heads=num_heads, kv_num_heads=num_heads)[0]


_TRANSLATIONS = {
    torch.ops.show1.attention.default: _attention,
    torch.ops.show1.temporal_attention.default: _attention,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress and absent optional packages on every call."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def dynamic_shapes(spec: GraphSpec) -> tuple[dict[int, Any], ...]:
    """The free axes of every input of a graph, in `torch.export`'s words."""
    dims = {}
    for name, axis in spec.profile.items():
        # A multiple is traced as such, so that halving and doubling cancel.
        least = axis.min // axis.multiple
        if name in ("height", "width"):  # traced with two pixels at the coarsest level: one would be a graph of its own
            least *= 2
        unit = torch.export.Dim(name, min=least, max=axis.max // axis.multiple)
        dims[name] = unit if axis.multiple == 1 else axis.multiple * unit
    return tuple(
        {i: dims[axis] for i, axis in enumerate(binding.axes) if isinstance(axis, str)} for binding in spec.inputs
    )


def trace(module: nn.Module, spec: GraphSpec, inputs: Sequence[Tensor]) -> ir.Model:
    """`inputs` are examples in the order of `spec.inputs`, with no dynamic axis of size 1 and no two of equal size.

    Raises ParityError when tracing baked in a size that the spec calls dynamic.
    """
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=dynamic_shapes(spec), strict=False)
        onnx_program = torch.onnx.export(
            program, (), opset_version=OPSET, dynamo=True, custom_translation_table=_TRANSLATIONS, verbose=False
        )
    assert onnx_program is not None
    model = onnx_program.model
    _name_bindings(model, spec)
    return model


def _name_bindings(model: ir.Model, spec: GraphSpec) -> None:
    """Bindings and axes by the contract's names; drop what tells of the exporter and the machine it ran on."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value.shape is not None:  # without the exporter's own symbols
                value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])
    for values, bindings in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        if len(values) != len(bindings):
            raise ParityError(f"{spec.name}: traced {len(values)} bindings, the contract has {len(bindings)}.")
        for value, binding in zip(values, bindings, strict=True):
            value.name = binding.name
            traced = value.shape
            if traced is not None:
                for axis, size in zip(binding.axes, traced, strict=True):
                    if isinstance(axis, str) and isinstance(size, int):
                        raise ParityError(f"{spec.name}: tracing fixed {binding.name}'s {axis} axis at {size}.")
            value.shape = ir.Shape(binding.axes)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None
    model.graph.name = spec.name
