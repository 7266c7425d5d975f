"""What a receiver asks of SGLang's model before it takes quantised weights: that its parameters keep them as they come.

On some hardware SGLang packs, shuffles or rescales block-fp8 parameters after it has loaded them (`process_weights_after_loading` of its
fp8 layers); bytes that are copied to such a place later would be read as something else.
"""

from collections.abc import Mapping

import torch

from tandem.engine.quantised import FP8
from tandem.engine.rollout.sglang_trace import Trace
from tandem.engine.types import TensorMeta, WeightTransferError

_FIX = "set rollout.quantization to None"
# Attributes by which SGLang's layers, and their parameters, say that they are kept in another way.
_OF_LAYERS = {
    "use_intel_amx_backend": "are packed for AMX",
    "aiter_bpreshuffled": "are shuffled for AITER",
    "workspace": "are repacked for Marlin",  # fp8 on GPUs of compute capability below 8.9
    "block_fp8_mxfp8_ready": "are converted to MXFP8",
}
_OF_PARAMETERS = {"is_shuffled": "are shuffled for AITER", "format_ue8m0": "have scales that are powers of two, for DeepGEMM"}


def check_layers(model: torch.nn.Module) -> None:
    """Raises: WeightTransferError naming the first layer whose quantised weights are not kept as a checkpoint has them."""
    found = False
    for name, layer in model.named_modules():
        parameters = [parameter for parameter in layer._parameters.values() if parameter is not None]
        if all(parameter.dtype != FP8 for parameter in parameters):
            continue
        found = True
        marks = [(layer, mark, how) for mark, how in _OF_LAYERS.items()]
        marks += [(parameter, mark, how) for parameter in parameters for mark, how in _OF_PARAMETERS.items()]
        for owner, mark, how in marks:
            value = getattr(owner, mark, None)
            if isinstance(value, torch.Tensor) or value is True:
                raise WeightTransferError(f"the weights of SGLang's {name} {how} on this machine, and cannot be exchanged there; {_FIX}")
    if not found:
        raise WeightTransferError(f"no parameter of SGLang's {type(model).__name__} is float8_e4m3fn after it has started; {_FIX}")


def check_copies(trace: Trace, tensors: Mapping[str, TensorMeta]) -> None:
    """Raises: WeightTransferError naming a parameter that would not get the bytes of a quantised matrix, or its scales."""
    names = list(trace.targets)
    exact = {name for name, meta in tensors.items() if meta.dtype == FP8 or meta.name.endswith("_scale_inv")}
    for copy in trace.copies:
        target = trace.targets[names[copy.target]]
        if copy.name in exact and target.dtype != tensors[copy.name].dtype:
            what = f"{copy.name} is {tensors[copy.name].dtype}, SGLang's parameter {names[copy.target]} {target.dtype}"
            raise WeightTransferError(f"{what}: it computes with other blocks on this machine; {_FIX}")
        if target.dtype == FP8 and copy.name not in exact:
            raise WeightTransferError(f"SGLang's parameter {names[copy.target]} is float8_e4m3fn, but {copy.name} is not; {_FIX}")
