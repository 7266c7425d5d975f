"""Linear log-prob against fp64 log_softmax: the reference and the Triton kernels, off the block sizes, at extremes and over ranks."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from benchmarks.instruments import peak_bytes
from tandem.kernels import backend
from tandem.kernels.logprob import linear_logprob, linear_logprob_sum, reference
from tests.kernels.interpreter import DEVICE  # before any kernel
from tests.ranks import run_ranks

# log-prob, entropy, relative Frobenius of the gradients: fp32 sums of at most a few hundred terms; in bf16 and fp16 the logits are
# still fp32, but a gradient is rounded to the operands' dtype, and so is dz on its way (2^-9 and 2^-11 each)
TOLERANCES = {torch.float32: (2e-5, 2e-5, 2e-6), torch.bfloat16: (1e-4, 2e-4, 4e-3), torch.float16: (1e-4, 2e-4, 1e-3)}


class Case(NamedTuple):
    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    targets_T: torch.Tensor
    grad_logprobs_T: torch.Tensor
    grad_entropy_T: torch.Tensor


@pytest.fixture(params=["reference", "reference with oneDNN", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "reference with oneDNN":
        if DEVICE != "cpu" or not torch.backends.mkldnn.is_available():
            pytest.skip("oneDNN multiplies on a CPU, where torch was built with it")
        monkeypatch.setattr(reference, "MIN_FAST_TERMS", 0)
    choice: backend.Backend = "triton" if request.param == "triton" else "reference"
    with backend.chosen(choice):
        yield choice


def _case(num_tokens: int = 13, vocab: int = 24, width: int = 10, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Case:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden, weight = torch.randn(num_tokens, width, generator=generator), torch.randn(vocab, width, generator=generator)
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    grads = torch.randn(2, num_tokens, generator=generator)
    scale = 2 * width**-0.5  # a standard deviation of 2 in the logits
    return Case(hidden.to(device, dtype), (scale * weight).to(device, dtype), targets.to(device), *grads.to(device))


def _exact(case: Case, temperature: torch.Tensor | float) -> tuple[torch.Tensor, ...]:
    hidden, weight = case.hidden_TH.double().requires_grad_(), case.weight_VH.double().requires_grad_()
    scale = torch.as_tensor(temperature, dtype=torch.float64, device=hidden.device).reshape(-1, 1)
    logp = (hidden @ weight.T / scale).log_softmax(-1)
    logprobs, entropy = logp.gather(1, case.targets_T[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    grads = torch.autograd.grad((logprobs * case.grad_logprobs_T).sum() + (entropy * case.grad_entropy_T).sum(), (hidden, weight))
    return logprobs.detach(), entropy.detach(), *grads


def _own(case: Case, temperature: torch.Tensor | float, **options: Any) -> tuple[torch.Tensor, ...]:
    tp = dist.get_world_size() if dist.is_initialized() else 1
    group = dist.group.WORLD if tp > 1 else None
    weight = case.weight_VH.chunk(tp)[dist.get_rank() if tp > 1 else 0].clone().requires_grad_()
    hidden = case.hidden_TH.clone().requires_grad_()
    logprobs, entropy = linear_logprob(hidden, weight, case.targets_T, temperature=temperature, tp_group=group, **options)
    grads = torch.autograd.grad((logprobs * case.grad_logprobs_T).sum() + (entropy * case.grad_entropy_T).sum(), (hidden, weight))
    return logprobs.detach(), entropy.detach(), *grads


def _relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


def _compare(own: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    logprob_tolerance, entropy_tolerance, grad_tolerance = TOLERANCES[dtype]
    assert (own[0] - exact[0]).abs().max() <= logprob_tolerance
    assert (own[1] - exact[1]).abs().max() <= entropy_tolerance
    for x, y in zip(own[2:], exact[2:], strict=True):
        assert x.dtype == dtype
        assert _relative(x, y) <= grad_tolerance


@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.linspace(0.5, 2.0, 13)])
def test_values_and_gradients_equal_fp64(temperature: torch.Tensor | float, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.BLOCK_COLUMNS, "cpu", 9)  # the last block of columns has six
    monkeypatch.setitem(reference.BLOCK_LOGITS, "cpu", 4 * 9)  # four tokens a block, and one left over
    _compare(_own(_case(), temperature), _exact(_case(), temperature), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "vocab", "width"),
    [
        (torch.bfloat16, 130, 1100, 72),  # off the row tile, the split and the depth of a tile
        (torch.float16, 1, 257, 64),
        (torch.bfloat16, 5, 40, 20),  # rows that the bulk copy engine cannot address
        (torch.float32, 70, 65, 33),
    ],
)
def test_sizes_off_every_tile_and_16_bit_operands(dtype: torch.dtype, num_tokens: int, vocab: int, width: int, implementation: str) -> None:
    case = _case(num_tokens, vocab, width, dtype)
    _compare(_own(case, 0.7), _exact(case, 0.7), dtype)


def test_gradients_of_blocks_are_added_up(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.kernels.logprob import triton

    for module, name, value in ((triton, "BLOCK_TOKENS", 64), (triton, "BLOCK_COLUMNS", 128), (triton, "ROW_TOKENS", 64)):
        monkeypatch.setattr(module, name, value)
    case = _case(100, 200, 40)
    _compare(_own(case, 0.7), _exact(case, 0.7), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_that_the_forward_pass_computes_is_that_of_the_sum(
    dtype: torch.dtype, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reference.ROW_LOGITS, "cpu", 40 * 300)  # blocks of 40, 40 and 20 tokens
    monkeypatch.setitem(reference.BLOCK_COLUMNS, "cpu", 90)  # the last of four has 30
    case = _case(100, 300, 40, dtype)._replace(grad_entropy_T=torch.zeros(100, device=DEVICE))
    hidden, weight = case.hidden_TH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    total, logprobs, entropy = linear_logprob_sum(hidden, weight, case.targets_T, case.grad_logprobs_T, temperature=0.7)
    grads = torch.autograd.grad(total * 2, (hidden, weight))
    exact = _exact(case, 0.7)
    _compare((logprobs, entropy, grads[0] / 2, grads[1] / 2), exact, dtype)
    assert total.item() == pytest.approx((exact[0] * case.grad_logprobs_T).sum().item(), rel=1e-4)
    assert not logprobs.requires_grad


def test_the_same_inputs_give_the_same_bits(implementation: str) -> None:
    case = _case(130, 300, 40, torch.bfloat16)
    for x, y in zip(_own(case, 0.7), _own(case, 0.7), strict=True):
        assert torch.equal(x, y)


def test_one_of_the_gradients_alone(implementation: str) -> None:
    case = _case(20, 70, 24)
    for only in (0, 1):
        zero = torch.zeros_like(case.grad_logprobs_T)
        part = case._replace(grad_entropy_T=zero) if only == 0 else case._replace(grad_logprobs_T=zero)
        hidden, weight = case.hidden_TH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
        output = linear_logprob(hidden, weight, case.targets_T)[only]
        grads = torch.autograd.grad((output * part[3 + only]).sum(), (hidden, weight))
        for x, y in zip(grads, _exact(part, 1.0)[2:], strict=True):
            assert _relative(x, y) <= 2e-6


def test_tokens_that_are_not_valid_have_zeros_and_no_gradient(implementation: str) -> None:
    case = _case(30, 70, 24)
    valid_T = torch.arange(30, device=DEVICE) % 3 == 0
    own = _own(case, 0.7, valid_T=valid_T)
    zero = torch.zeros(30, device=DEVICE)
    masked = case._replace(
        grad_logprobs_T=torch.where(valid_T, case.grad_logprobs_T, zero), grad_entropy_T=torch.where(valid_T, case.grad_entropy_T, zero)
    )
    exact = _exact(masked, 0.7)
    _compare(own, (exact[0] * valid_T, exact[1] * valid_T, *exact[2:]), torch.float32)
    assert not own[0][~valid_T].any()
    assert not own[2][~valid_T].any()


@pytest.mark.distributed
@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_ranks_that_split_the_vocabulary_agree_bit_for_bit_with_whole_hidden_gradients(choice: backend.Backend) -> None:
    if DEVICE == "cuda":
        pytest.skip("the ranks are forked CPU processes: autograd refuses to work in them once it has had a GPU")
    with backend.chosen(choice):  # ranks are forked
        results = run_ranks(_on_ranks, 3, _case(device="cpu"))
    logprobs, entropy, grad_hidden, grad_weight = _exact(_case(device="cpu"), 0.9)
    for result in results:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])
        for x, y in zip(result[:3], (logprobs, entropy, grad_hidden), strict=True):
            assert torch.allclose(x.double(), y, atol=2e-5)
        assert result[4] == pytest.approx((logprobs * _case(device="cpu").grad_logprobs_T).sum().item(), rel=1e-5)
    assert torch.allclose(torch.cat([result[3] for result in results]).double(), grad_weight, atol=2e-5)


def _on_ranks(case: Case) -> tuple[Any, ...]:
    weight = case.weight_VH.chunk(3)[dist.get_rank()].clone()
    total, _, _ = linear_logprob_sum(
        case.hidden_TH, weight, case.targets_T, case.grad_logprobs_T, temperature=0.9, tp_group=dist.group.WORLD
    )
    return *_own(case, 0.9), total.item()


def test_logits_far_from_zero_do_not_overflow(implementation: str) -> None:
    hidden, weight = torch.full((2, 1), 200.0, device=DEVICE), torch.full((4, 1), -5.0, device=DEVICE)
    logprobs, entropy = linear_logprob(hidden, weight, torch.tensor([0, 3], device=DEVICE))
    assert torch.allclose(logprobs.cpu(), torch.tensor(4.0).log().neg().expand(2))  # all logits are -1000
    assert torch.allclose(entropy.cpu(), torch.tensor(4.0).log().expand(2))
    weight = torch.tensor([[50.0], [-50.0], [0.0]], device=DEVICE)  # logits of ±1e4
    logprobs, entropy = linear_logprob(hidden, weight, torch.tensor([0, 1], device=DEVICE))
    assert logprobs.tolist() == [0.0, -20000.0]
    assert entropy.tolist() == [0.0, 0.0]


def test_a_number_that_is_none_is_not_hidden(implementation: str) -> None:
    case = _case(3, 30, 8)
    case.hidden_TH[1, 0] = math.nan
    logprobs, entropy = linear_logprob(case.hidden_TH, case.weight_VH, case.targets_T)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


def test_no_tokens_give_no_log_probs_and_a_zero_gradient(implementation: str) -> None:
    weight = torch.randn(5, 3, requires_grad=True, device=DEVICE)
    hidden, targets = torch.zeros(0, 3, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    logprobs, _ = linear_logprob(hidden, weight, targets)
    (grad,) = torch.autograd.grad(logprobs.sum(), weight)
    assert logprobs.shape == (0,)
    assert not grad.any()
    total, _, _ = linear_logprob_sum(hidden, weight, targets, torch.zeros(0, device=DEVICE))
    assert not torch.autograd.grad(total, weight)[0].any()


def test_the_reference_passes_gradcheck() -> None:
    case = _case(5, 11, 4, torch.float64, "cpu")
    hidden, weight = case.hidden_TH.requires_grad_(), case.weight_VH.requires_grad_()
    temperature = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: linear_logprob(x, w, case.targets_T, temperature=temperature), (hidden, weight))
    c = case.grad_logprobs_T.double()
    assert torch.autograd.gradcheck(lambda x, w: linear_logprob_sum(x, w, case.targets_T, c)[0], (hidden, weight))


BAD = {
    r"hidden \(4, 8\), weight \(5, 7\)": {"weight_VH": torch.zeros(5, 7)},
    r"weight torch.bfloat16": {"weight_VH": torch.zeros(5, 8, dtype=torch.bfloat16)},
    r"targets torch.int32": {"targets_T": torch.zeros(4, dtype=torch.int32)},
    r"weight has strides \(1, 5\)": {"weight_VH": torch.zeros(8, 5).T},
    r"targets are in \[0, 5\]; they must be in \[0, 5\)": {"targets_T": torch.tensor([0, 5, 1, 1])},
    r"temperature is 0.0": {"temperature": 0.0},
    r"temperature has shape \(3,\)": {"temperature": torch.ones(3)},
    r"valid_T is torch.int64": {"valid_T": torch.ones(4, dtype=torch.int64)},
    r"weight is \(0, 8\)": {"weight_VH": torch.zeros(0, 8)},
    r"weight on meta": {"weight_VH": torch.zeros(5, 8, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_an_error_that_says_so(message: str) -> None:
    good: dict[str, Any] = {"hidden_TH": torch.zeros(4, 8), "weight_VH": torch.zeros(5, 8), "targets_T": torch.tensor([0, 1, 2, 3])}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(good | BAD[message]))


def test_coefficients_that_do_not_fit_and_fp64_in_triton_are_errors() -> None:
    with pytest.raises(ValueError, match=r"coefficients_T is torch.float32 \(3,\)"):
        linear_logprob_sum(torch.zeros(4, 8), torch.zeros(5, 8), torch.tensor([0, 1, 2, 3]), torch.zeros(3))
    with pytest.raises(ValueError, match=r"hidden is torch\.float64"), backend.chosen("triton"):
        linear_logprob(torch.zeros(4, 8).double(), torch.zeros(5, 8).double(), torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("num_tokens", "vocab"), [(1024, 32_000), pytest.param(8192, 32_768, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_peak_memory_of_the_reference_is_at_most_a_tenth_of_plain_torch(num_tokens: int, vocab: int) -> None:
    case = _case(num_tokens, vocab, 16, device="cpu")
    hidden, weight = case.hidden_TH.requires_grad_(), case.weight_VH.requires_grad_()

    def plain() -> Any:
        return (hidden @ weight.T).log_softmax(-1).gather(1, case.targets_T[:, None])

    def own() -> Any:
        return linear_logprob(hidden, weight, case.targets_T)[0]

    def in_forward() -> Any:
        return linear_logprob_sum(hidden, weight, case.targets_T, case.grad_logprobs_T)[0]

    def peak(logprobs: Any, *, backward: bool) -> int:
        def run() -> Any:
            with torch.set_grad_enabled(backward):
                found = logprobs()
                return torch.autograd.grad(found.sum(), (hidden, weight)) if backward else found

        return peak_bytes(run, torch.device("cpu"))

    forward, both = peak(plain, backward=False), peak(plain, backward=True)
    assert both > forward >= 2 * num_tokens * vocab * 4  # the measure works
    assert peak(own, backward=False) <= 0.1 * forward
    assert peak(own, backward=True) <= 0.1 * both
    if num_tokens * vocab >= 16 * reference.ROW_LOGITS["cpu"]:  # it holds so many logits however few tokens there are
        assert peak(in_forward, backward=True) <= 0.1 * both


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_more_than_two_to_the_31_logits_are_counted_right() -> None:
    """The reference; the Triton kernels, which have no [T, V] offsets either, have run this size on no machine."""
    case = _case(1 << 17, (1 << 14) + 5, 2, device="cpu")
    assert len(case.targets_T) * len(case.weight_VH) > 1 << 31
    hidden = case.hidden_TH.requires_grad_()
    logprobs, entropy = linear_logprob(hidden, case.weight_VH, case.targets_T)
    (grad,) = torch.autograd.grad((logprobs * case.grad_logprobs_T).sum(), hidden)
    for rows in (slice(0, 16), slice(-16, None)):
        part = Case(case.hidden_TH[rows].detach(), case.weight_VH, *(x[rows] for x in case[2:]))
        exact = _exact(part._replace(grad_entropy_T=torch.zeros(16)), 1.0)
        for found, wanted, limit in zip((logprobs[rows], entropy[rows], grad[rows]), exact[:3], (2e-5, 2e-5, 2e-5), strict=True):
            assert (found - wanted).abs().max() <= limit
