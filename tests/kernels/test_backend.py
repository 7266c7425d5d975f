"""Which implementation is chosen, and what is said about it."""

import pytest
import torch

from tandem.kernels import backend
from tandem.kernels.attention import packed_attention
from tandem.kernels.grouped_gemm import grouped_linear
from tandem.kernels.logprob import linear_logprob
from tandem.kernels.norm import rms_norm
from tandem.kernels.swiglu import swiglu


def test_a_cpu_runs_the_reference_and_its_twin_and_the_choice_ends_with_its_block() -> None:
    tensor = torch.zeros(1)
    assert (backend.runs_triton(tensor), backend.runs_native(tensor)) == (False, True)
    with backend.chosen("triton"):
        assert (backend.runs_triton(tensor), backend.runs_native(tensor)) == (True, False)
    with backend.chosen("reference"):
        assert (backend.runs_triton(tensor), backend.runs_native(tensor)) == (False, False)
    assert backend.runs_native(tensor)


def test_triton_that_is_not_installed_is_said_before_it_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        backend.choose("triton")
    assert "slow" in backend.describe(on_gpu=True)


def test_every_choice_is_described() -> None:
    seen = set()
    for choice in ("auto", "reference", "triton", "native"):
        with backend.chosen(choice):
            seen |= {backend.describe(on_gpu=False), backend.describe(on_gpu=True)}
    assert {"plain torch", "Triton"} <= seen
    assert all(text for text in seen)


def test_a_cpu_tensor_for_a_gpu_kernel_is_an_error_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_interprets", lambda: False)
    q, weight = torch.zeros(4, 2, 16), torch.ones(16)
    calls = {
        "norm": lambda: rms_norm(q, weight, 1e-6),
        "swiglu": lambda: swiglu(q),
        "attention": lambda: packed_attention(q, q, q, torch.full((4,), 4)),
        "logprob": lambda: linear_logprob(q[:, 0].contiguous(), torch.zeros(5, 16), torch.arange(4)),
        "experts": lambda: grouped_linear(q[:, 0], [torch.zeros(8, 16)], torch.tensor([0, 4], dtype=torch.int32)),
    }
    for call in calls.values():
        with (
            backend.chosen("triton"),
            pytest.raises(ValueError, match=r"a tensor of shape \(4, .* is on cpu, but kernels='triton' computes"),
        ):
            call()
