"""Responses of one prompt brought side by side. Shapes: R responses, G groups."""

import torch


def by_group(group_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(order_R, cu_groups): the responses' positions group by group, each group in its own order, and [G+1] int32 offsets into them."""
    order_R = torch.argsort(group_R, stable=True)
    _, sizes_G = torch.unique(group_R, return_counts=True)
    return order_R, torch.nn.functional.pad(sizes_G.cumsum(0), (1, 0)).int()
