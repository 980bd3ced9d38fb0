"""The compute core, typed: packing, the forward pass, sampling. Shapes and layouts: `csrc/kernels.h`.

It computes what it is told to and decides nothing: which rows, which blocks and which sequence is whose are the
caller's. Arguments are checked there; ValueError names the value and what was expected, RuntimeError names the layer
in which a value stopped being finite, MemoryError means address space ran out. The GIL is released while computing.
`reference.py` has the same functions in NumPy; `tests/conformance/test_kernels.py` holds the two together.
"""

from hob.native._core import (
    KvPool,
    Model,
    Workspace,
    available_isas,
    cpu_features,
    density,
    forward,
    hidden,
    logits,
    pack_tensor,
    request_stop,
    sample,
    scores,
    uniform,
)

__all__ = [
    "KvPool",
    "Model",
    "Workspace",
    "available_isas",
    "cpu_features",
    "density",
    "forward",
    "hidden",
    "logits",
    "pack_tensor",
    "request_stop",
    "sample",
    "scores",
    "uniform",
]
