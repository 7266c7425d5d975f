"""Which implementation is chosen, and what is said about it."""

import pytest
import torch

from tandem.kernels import backend


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
