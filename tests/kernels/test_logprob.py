"""Linear log-prob against fp64 log_softmax, with gradients, off the slab size and over ranks."""

import pytest
import torch
import torch.distributed as dist

from tandem.kernels.logprob import linear_logprob, reference
from tests.ranks import run_ranks

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _case(num_tokens: int = 13, vocab: int = 24, width: int = 10) -> Case:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(num_tokens, width, generator=generator), torch.randn(vocab, width, generator=generator)
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return hidden, weight, targets, torch.randn(num_tokens, generator=generator), torch.randn(num_tokens, generator=generator)


def _exact(case: Case, temperature: torch.Tensor | float) -> tuple[torch.Tensor, ...]:
    hidden, weight, targets, g_logprob, g_entropy = case
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    scale = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    logp = (hidden @ weight.T / scale).log_softmax(-1)
    logprobs, entropy = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    grads = torch.autograd.grad((logprobs * g_logprob).sum() + (entropy * g_entropy).sum(), (hidden, weight))
    return logprobs.detach(), entropy.detach(), *grads


def _own(case: Case, temperature: torch.Tensor | float) -> tuple[torch.Tensor, ...]:
    hidden, weight, targets, g_logprob, g_entropy = case
    tp = dist.get_world_size() if dist.is_initialized() else 1
    group = dist.group.WORLD if tp > 1 else None
    weight = weight.chunk(tp)[dist.get_rank() if tp > 1 else 0].clone().requires_grad_()
    hidden = hidden.clone().requires_grad_()
    logprobs, entropy = linear_logprob(hidden, weight, targets, temperature=temperature, tp_group=group)
    grads = torch.autograd.grad((logprobs * g_logprob).sum() + (entropy * g_entropy).sum(), (hidden, weight))
    return logprobs.detach(), entropy.detach(), *grads


@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.linspace(0.5, 2.0, 13)])
def test_values_and_gradients_equal_fp64(temperature: torch.Tensor | float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SLAB_LOGITS", 4 * 24)  # four tokens a slab, and one left over
    for x, y in zip(_own(_case(), temperature), _exact(_case(), temperature), strict=True):
        assert torch.allclose(x.double(), y, atol=2e-5, rtol=1e-5)


@pytest.mark.distributed
def test_ranks_that_split_the_vocabulary_agree_bit_for_bit_with_whole_hidden_gradients() -> None:
    results = run_ranks(_own, 3, _case(), 0.9)
    logprobs, entropy, grad_hidden, grad_weight = _exact(_case(), 0.9)
    for result in results:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])
        for x, y in zip(result[:3], (logprobs, entropy, grad_hidden), strict=True):
            assert torch.allclose(x.double(), y, atol=2e-5)
    assert torch.allclose(torch.cat([result[3] for result in results]).double(), grad_weight, atol=2e-5)


def test_logits_far_below_zero_do_not_overflow() -> None:
    logprobs, entropy = linear_logprob(torch.full((2, 1), 200.0), torch.full((4, 1), -5.0), torch.tensor([0, 3]))
    assert torch.allclose(logprobs, torch.tensor(4.0).log().neg().expand(2))
    assert torch.allclose(entropy, torch.tensor(4.0).log().expand(2))


def test_no_tokens_give_no_log_probs_and_a_zero_gradient() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    logprobs, _ = linear_logprob(torch.zeros(0, 3), weight, torch.zeros(0, dtype=torch.int64))
    (grad,) = torch.autograd.grad(logprobs.sum(), weight)
    assert logprobs.shape == (0,)
    assert not grad.any()
