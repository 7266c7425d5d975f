"""Weights as 8-bit floats with block scales (rollout.quantization=block_fp8): which tensors, under which names, and for which engines.

The format is that of DeepSeek-V3's checkpoints (arXiv:2412.19437, 3.3): a matrix `X.weight` is float8_e4m3fn, and beside it
`X.weight_scale_inv` has one fp32 number for each block of 128 x 128, by which the block's elements are to be multiplied.
"""

from collections.abc import Iterable
from typing import Any

import torch

from tandem.engine.architecture import Architecture
from tandem.engine.types import TensorMeta
from tandem.kernels.block_fp8 import BLOCK, scale_shape

FP8 = torch.float8_e4m3fn
_MATRICES = ("_proj.weight", "_proj_with_mqa.weight")
_SCALES = "_scale_inv"


def is_quantised(name: str) -> bool:
    """Whether the tensor of this Hugging Face name is: the projections of attention, feed-forward layers and experts.

    Embeddings, output head, norms, biases and routers stay as they are.
    """
    return name.startswith("model.layers.") and name.endswith(_MATRICES)


def scale_name(name: str) -> str:
    """Of a quantised matrix."""
    return name + _SCALES


def quantised(tensors: Iterable[TensorMeta]) -> list[TensorMeta]:
    """The tensors of a model as a block-fp8 checkpoint has them, each matrix followed by its scales."""
    found = []
    for meta in tensors:
        if not is_quantised(meta.name):
            found.append(meta)
            continue
        rows, columns = meta.shape
        found.append(TensorMeta(name=meta.name, shape=meta.shape, dtype=FP8))
        found.append(TensorMeta(name=scale_name(meta.name), shape=scale_shape(rows, columns), dtype=torch.float32))
    return found


def quantization_config() -> dict[str, Any]:
    """What config.json says of such a model."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def problem_of_engine(architecture: Architecture, tp: int) -> str:
    """Why an engine of `tp` processes cannot hold the blocks, naming the projection and its size; "" if it can.

    What SGLang joins or cuts must begin with a block of its own.
    """
    for projection, side, size in _sides(architecture, tp):
        if size % BLOCK:
            return (
                f"rollout.quantization is block_fp8, but with rollout.tp={tp} a process of an engine has {size} {side} of {projection}, "
                f"which is no multiple of {BLOCK}: SGLang cuts or joins that projection there"
            )
    return ""


def _sides(architecture: Architecture, tp: int) -> Iterable[tuple[str, str, int]]:
    """(projection, rows or columns, how many each process has) of all that SGLang joins with another one, or cuts."""
    a, experts, latent = architecture, architecture.experts, architecture.latent
    if latent is None:
        yield "q_proj", "rows", a.num_heads // tp * a.head_dim
        yield "k_proj and v_proj", "rows", max(1, a.num_kv_heads // tp) * a.head_dim
    elif tp > 1:
        yield "q_b_proj" if latent.q_lora_rank is not None else "q_proj", "rows", a.num_heads // tp * a.head_dim
        yield "kv_b_proj", "rows", a.num_heads // tp * (latent.qk_nope_head_dim + latent.v_head_dim)
    if tp > 1:
        yield "o_proj", "columns", a.num_heads // tp * a.v_head_dim
    if not all(a.sparse_layers):
        yield "gate_proj and up_proj", "rows", a.intermediate_size // tp
    if experts is not None:
        yield "the experts' gate_proj and up_proj", "rows", experts.intermediate_size // tp
        if experts.shared_intermediate_size:
            yield "the shared experts' gate_proj and up_proj", "rows", experts.shared_intermediate_size // tp
