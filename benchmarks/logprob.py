"""Linear layer, log-prob and entropy in one: against plain torch on a CPU; chunked torch, torch.compile, Liger and CCE on a GPU.

python benchmarks/logprob.py [--case forward+backward] [--out DIR]        options: benchmarks/harness.py
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Subject, compiled, installed, main
from tandem.kernels.backend import chosen
from tandem.kernels.logprob import linear_logprob, linear_logprob_sum

CHUNK_TOKENS = 1024  # of the chunked torch peer: 0.6 GB of fp32 logits at V = 152k

# Hidden widths at which a CPU is measured: the products weigh more and more against the passes over the logits.
CPU_WIDTHS = (64, 256, 1024, 2048)


class Inputs(NamedTuple):
    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    targets_T: torch.Tensor
    coefficients_T: torch.Tensor  # gradient of the log-probs


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def _inputs(num_tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits with a standard deviation of about 3."""
    hidden = torch.randn(num_tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device=device) * (2.0 * width**-0.5)).to(dtype).requires_grad_()
    return Inputs(hidden, weight, torch.randint(0, vocab, (num_tokens,), device=device), torch.randn(num_tokens, device=device))


def _plain(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits_TV = (hidden_TH @ weight_VH.T).float()
    logp_TV = logits_TV.log_softmax(-1)
    return logp_TV.gather(1, targets_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def _plain_logprobs(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Without the entropy."""
    return ((hidden_TH @ weight_VH.T).float().log_softmax(-1).gather(1, targets_T[:, None])[:, 0],)


def _in_chunks(chunk: Forward) -> Forward:
    """Over chunks of tokens, each recomputed in the backward pass."""

    def forward(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            checkpoint(chunk, hidden_cH, weight_VH, targets_c, use_reentrant=False)
            for hidden_cH, targets_c in zip(hidden_TH.split(CHUNK_TOKENS), targets_T.split(CHUNK_TOKENS), strict=True)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    return forward


def _ours(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_logprob(hidden_TH, weight_VH, targets_T)


def _reference(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with chosen("reference"):
        return linear_logprob(hidden_TH, weight_VH, targets_T)


def _grads(logprobs_T: torch.Tensor, x: Inputs) -> tuple[torch.Tensor, ...]:
    grads = torch.autograd.grad(logprobs_T, (x.hidden_TH, x.weight_VH), x.coefficients_T.to(logprobs_T.dtype))
    return logprobs_T.detach(), *grads


def _forward(forward: Forward) -> Callable[[Any], tuple[torch.Tensor, ...]]:
    def run(x: Inputs) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return forward(x.hidden_TH, x.weight_VH, x.targets_T)

    return run


def _forward_backward(forward: Forward) -> Callable[[Any], tuple[torch.Tensor, ...]]:
    return lambda x: _grads(forward(x.hidden_TH, x.weight_VH, x.targets_T)[0], x)


def _in_fp64(x: Inputs) -> Inputs:
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (x.hidden_TH, x.weight_VH))
    return Inputs(hidden, weight, x.targets_T, x.coefficients_T)


def _exact(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    logp_TV = (x.hidden_TH @ x.weight_VH.T).log_softmax(-1)
    return logp_TV.gather(1, x.targets_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def _exact_forward(x: Inputs) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return _exact(_in_fp64(x))


def _exact_forward_backward(x: Inputs) -> tuple[torch.Tensor, ...]:
    x = _in_fp64(x)
    return _grads(_exact(x)[0], x)


def _in_forward(x: Inputs) -> tuple[torch.Tensor, ...]:
    """Ours, with coefficients that are known beforehand."""
    total, logprobs_T, _ = linear_logprob_sum(x.hidden_TH, x.weight_VH, x.targets_T, x.coefficients_T)
    return logprobs_T, *torch.autograd.grad(total, (x.hidden_TH, x.weight_VH))


def _cce(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """cut-cross-entropy, which has no entropy."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return (-linear_cross_entropy(hidden_TH, weight_VH, targets_T, reduction="none").float(),)


def _liger_scaled(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Liger's scaled cross entropy, with entropy. On Hopper it is written in CuTe and needs nvidia-cutlass-dsl."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # pyright: ignore[reportMissingImports]

    loss_T, entropy_T = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden_TH, weight_VH, targets_T, return_entropy=True)
    return -loss_T, entropy_T


def _liger(x: Inputs) -> tuple[torch.Tensor, ...]:
    """Liger's fused linear cross entropy, which sums: its gradient is for equal coefficients."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(x.weight_VH, x.hidden_TH, x.targets_T)
    return torch.autograd.grad(-loss, (x.hidden_TH, x.weight_VH))


def _summed(run: Callable[[Any], tuple[torch.Tensor, ...]]) -> Callable[[Any], tuple[torch.Tensor, ...]]:
    """Gradients alone, with all coefficients 1."""
    return lambda x: run(x._replace(coefficients_T=torch.ones_like(x.coefficients_T)))[-2:]


def _sized(name: str, num_tokens: int, width: int, vocab: int, dtype: torch.dtype, runs: dict[str, Any], **options: Any) -> Case:
    backward = name != "forward"
    operands = torch.finfo(dtype).bits // 8 * width * (num_tokens + vocab)
    exact, tolerances = {
        "forward": (_exact_forward, (2e-4, 2e-4)),
        "forward+backward": (_exact_forward_backward, (2e-4, 4e-3, 4e-3)),
        "summed loss": (_summed(_exact_forward_backward), (4e-3, 4e-3)),
    }[name]
    return Case(
        name=name,
        shape={"T": num_tokens, "H": width, "V": vocab},
        dtype=dtype,
        flop=(6 if backward else 2) * num_tokens * width * vocab,  # logits, and their products with weight and hidden
        bytes=operands * (2 if backward else 1) + 16 * num_tokens,
        inputs=lambda device: _inputs(num_tokens, width, vocab, dtype, device),
        exact=exact,
        tolerances=tolerances,
        runs=runs,
        **options,
    )


def _runs(device: torch.device, *, with_reference: bool) -> dict[str, dict[str, Any]]:
    """Implementations of each case; ours first."""
    peers: dict[str, Forward] = {}
    if device.type == "cpu":
        first = "reference"
        peers["plain torch"] = _plain
    else:
        first = "kernel"
        peers["chunked torch"] = _in_chunks(_plain)
        peers["torch.compile"] = _in_chunks(compiled(_plain))
        if with_reference:
            peers["reference"] = _reference
    both = {run: _forward_backward(call) for run, call in {first: _ours, **peers}.items()}
    both["gradient in forward"] = _in_forward
    if device.type == "cpu":
        both["plain torch, no entropy"] = _forward_backward(_plain_logprobs)
    summed = {first: _summed(_in_forward), "gradient in backward": _summed(_forward_backward(_ours))}
    if device.type == "cuda" and installed("cut_cross_entropy"):
        both["cut-cross-entropy"] = _forward_backward(_cce)
    if device.type == "cuda" and installed("liger_kernel"):
        peers["liger scaled"] = _liger_scaled
        both["liger scaled"] = _forward_backward(_liger_scaled)
        summed["liger"] = _liger
    forward = {run: _forward(call) for run, call in {first: _ours, **peers}.items()}
    return {"forward": forward, "forward+backward": both, "summed loss": summed}


def cases(device: torch.device) -> list[Case]:
    """The smallest first."""
    if device.type == "cpu":
        sizes = [(512, 128, 4000, torch.float32), *((8192, width, 32_000, torch.float32) for width in CPU_WIDTHS)]
    else:
        sizes = [(4096, 4096, 32_000, torch.bfloat16), (32_768, 4096, 151_936, torch.bfloat16)]
    found = []
    for name in ("forward", "forward+backward", "summed loss"):
        for size in sizes[:2] if name == "summed loss" and device.type == "cpu" else sizes:  # on a CPU it says little that is new
            runs = _runs(device, with_reference=size == sizes[0])[name]  # in fp32, the large one takes it seconds
            off_tile = _sized(name, 509, size[1], 3997, size[3], runs)  # in fp64 the large ones would not fit
            found.append(_sized(name, *size, runs, check_on=off_tile))
    return found


SUBJECT = Subject(name="logprob", about="linear layer, log-prob and entropy in one", cases=cases)

if __name__ == "__main__":
    main(SUBJECT)
