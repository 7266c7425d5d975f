"""RMSNorm in few passes of plain torch. Shapes as in the package; `rstd_T` is 1 / sqrt(mean(x²) + eps), [..., 1] fp32."""

import torch


def forward(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_TH, rstd_T)."""
    x32_TH = x_TH.float()
    rstd_T1 = torch.linalg.vecdot(x32_TH, x32_TH)[..., None].div_(x_TH.shape[-1]).add_(eps).rsqrt_()
    return (x32_TH * rstd_T1).mul_(weight_H).to(x_TH.dtype), rstd_T1


def backward(grad_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, rstd_T1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of the weight."""
    grad32_TH, x32_TH, weight32_H = grad_TH.float(), x_TH.float(), weight_H.float()
    width = x_TH.shape[-1]
    product_TH = (grad32_TH * x32_TH).view(-1, width)
    dot_T = product_TH @ weight32_H
    grad_weight_H = rstd_T1.view(-1) @ product_TH
    grad_x_TH = (grad32_TH * weight32_H).mul_(rstd_T1)
    grad_x_TH.addcmul_(x32_TH, (dot_T.view(rstd_T1.shape) * rstd_T1.pow(3)).div_(width), value=-1)
    return grad_x_TH.to(x_TH.dtype), grad_weight_H.to(weight_H.dtype)
