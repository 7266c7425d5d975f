"""AdamW (arXiv:1711.05101) over many tensors at once: each element of weight, gradient and moments is read and written once.

    m ← β1·m + (1 - β1)·g          v ← β2·v + (1 - β2)·g²
    w ← (1 - lr·decay)·w - lr / (1 - β1ᵗ) · m / (√v / √(1 - β2ᵗ) + ε)

Of a weight that the model keeps in another type, the copy is written in the same pass. Optionally the weights' block-scaled 8-bit form
(`tandem.kernels.block_fp8`) follows in one more launch: its blocks of 128 x 128 are no runs of memory, as the optimizer's tiles are.

Least traffic with an fp32 gradient and a bf16 copy: 16 bytes read and 14 written for each weight; the 8-bit form reads 2 and writes 1.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tandem.kernels.adamw import reference
from tandem.kernels.adamw.inputs import Tensors, check, scalars_of
from tandem.kernels.backend import runs_triton

__all__ = ["FusedAdamW", "Tensors"]


class FusedAdamW:
    """Steps of a list of tensors with common settings. Keeps the tables of the launches while the tensors stay where they are."""

    def __init__(self) -> None:
        self._seen: list[Any] = []
        self._launches: Any = None  # kernels.adamw.triton.Launches, of the tensors seen last

    @torch.no_grad()
    def step(
        self, tensors: Sequence[Tensors], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, num_steps: int
    ) -> None:
        """One step, in place. The same bits in every run. On a GPU it waits for nothing, and no setting compiles anything anew.

        One launch for all tensors whose gradients and copies have the same types, and one for the 8-bit forms of each type. The settings
        as for torch.optim.AdamW; `num_steps` counts this step (1 in the first).
        Raises: ValueError for a setting out of range; when tensors are seen for the first time, for types, sizes, strides or devices
            that do not fit.
        """
        scalars = scalars_of(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, num_steps=num_steps)
        if not tensors:
            return
        seen = [(x.grad.dtype, *(0 if y is None else y.data_ptr() for y in x), x.weight.shape) for x in tensors]
        on_triton = runs_triton(tensors[0].weight)
        if seen != self._seen:
            check(tensors)
            self._seen, self._launches = seen, None
        if on_triton:
            from tandem.kernels.adamw import triton

            self._launches = self._launches or triton.Launches(tensors)
            self._launches.run(scalars)
        else:
            reference.step(tensors, scalars)
