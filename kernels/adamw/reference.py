"""AdamW in plain torch, one tensor after the other. Names as in the package."""

from collections.abc import Sequence

from tandem.kernels.adamw.inputs import Scalars, Tensors
from tandem.kernels.block_fp8 import quantise


def step(tensors: Sequence[Tensors], scalars: Scalars) -> None:
    """The operations of torch.optim.AdamW's loop over tensors, in its order: on a CPU the same bits."""
    for x in tensors:
        grad = x.grad.float()
        if scalars.keep != 1.0:
            x.weight.mul_(scalars.keep)
        x.exp_avg.lerp_(grad, scalars.lerp)
        x.exp_avg_sq.mul_(scalars.beta2).addcmul_(grad, grad, value=scalars.square)
        denominator = x.exp_avg_sq.sqrt().div_(scalars.root).add_(scalars.eps)
        x.weight.addcdiv_(x.exp_avg, denominator, value=-scalars.step_size)
        if x.copy is not None:
            x.copy.copy_(x.weight)
        if x.fp8 is not None and x.scale is not None:
            fp8_MN, scale = quantise(x.source)
            x.fp8.copy_(fp8_MN)
            x.scale.copy_(scale)
