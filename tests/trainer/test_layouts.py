"""Every layout of every family against one Hugging Face model in fp64 and one process: losses, every gradient, weights after two steps.

Always: the layouts with Qwen3 or, where it needs experts, Qwen3-MoE, on cross entropy and one other loss (they take turns); one layout of
8 ranks for the two families that differ most from those (biases; latent attention). `make test-all`: every layout of every family on every
loss.
"""

import functools
from typing import Any

import pytest
import torch

from tandem.engine.config import MeshConfig
from tests.ranks import run_ranks
from tests.trainer.compare import Errors, combine, compare, findings_of, rounding_errors
from tests.trainer.families import FAMILIES
from tests.trainer.layouts import LAYOUTS, Layout
from tests.trainer.reference import CROSS_ENTROPY, LOSSES, Reference, make_reference

OTHER_LOSSES = [name for name in LOSSES if name != CROSS_ENTROPY]

reference_of = functools.cache(make_reference)


def errors_of(layout: Layout, reference: Reference, of_losses: list[str]) -> Errors:
    return combine(run_ranks(compare, layout.num_ranks, layout, reference, of_losses), reference)


@functools.cache
def rounding_of(family: str, num_layers: int) -> Errors:
    return rounding_errors(family, reference_of(family, num_layers), num_layers)


def check(family: str, layout: Layout, of_losses: list[str]) -> None:
    errors = errors_of(layout, reference_of(family, layout.num_layers), of_losses)
    if errors.too_large():
        assert not errors.too_large(rounding_of(family, layout.num_layers)), errors.worst()


# Of the layouts that tests/trainer/test_families.py has always with another family.
ELSEWHERE = ("TP4, SP (fewer key heads)", "PP2", "PP2 VPP2", "CP2, selective recomputation")
LARGE = {"qwen2": "TP2 PP2 CP2, SP", "deepseek_v3": "TP2 EP4 ETP1 PP2 VPP2, SP, distributed optimizer"}


def is_always_run(family: str, layout: Layout) -> bool:
    if family in ("qwen3", "qwen3_moe"):
        return layout.needs_experts == (family == "qwen3_moe") and layout.name not in ELSEWHERE
    return layout.name == LARGE.get(family)


CASES = [(family, layout) for family, of in FAMILIES.items() for layout in LAYOUTS if layout.fits(experts=of.has_experts)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "layout", "loss"),
    [
        pytest.param(family, layout, OTHER_LOSSES[i % len(OTHER_LOSSES)], id=f"{family}, {layout.name}")
        for i, (family, layout) in enumerate(case for case in CASES if is_always_run(*case))
    ],
)
def test_a_layout_trains_like_hugging_face(family: str, layout: Layout, loss: str) -> None:
    check(family, layout, [CROSS_ENTROPY, loss])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("family", "layout"), [pytest.param(*case, id=f"{case[0]}, {case[1].name}") for case in CASES])
def test_every_layout_of_every_family_trains_like_hugging_face(family: str, layout: Layout) -> None:
    check(family, layout, list(LOSSES))


SP2 = {"tp": 2, "sequence_parallel": True}
BF16_LAYOUTS = {
    "qwen3": Layout(name="TP2 PP2 CP2", num_ranks=8, mesh=MeshConfig(pp=2, cp=2, **SP2), distributed_optimizer=True),
    "qwen3_moe": Layout(name="TP2 EP2 PP2", num_ranks=4, mesh=MeshConfig(pp=2, ep=2, **SP2), distributed_optimizer=True),
}


# Not the clipped ones: a ratio that rounding carries over the clip's edge changes the gradient at once.
SMOOTH_LOSSES = (CROSS_ENTROPY, "mirror descent", "mirror descent, stale tokens corrected", "mirror descent, reference of the rollout")


@functools.cache
def bf16_references(family: str) -> tuple[Reference, Errors]:
    """The model in fp64 with weights that bf16 holds, and the errors of Hugging Face in bf16 against that."""
    of_losses = {name: LOSSES[name] for name in SMOOTH_LOSSES}
    exact = make_reference(family, losses=of_losses, weights_dtype=torch.bfloat16)
    logprobs: Any = exact.reference_logprobs
    rounded = make_reference(family, losses=of_losses, dtype=torch.bfloat16, weights_dtype=torch.bfloat16, reference_logprobs=logprobs)
    return exact, combine([findings_of(rounded, exact)], exact)


@pytest.mark.distributed
@pytest.mark.parametrize("family", BF16_LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 8])
def test_bf16_is_about_as_near_to_fp32_as_hugging_face_in_bf16(family: str, num_ranks: int) -> None:
    exact, theirs = bf16_references(family)
    layout = BF16_LAYOUTS[family] if num_ranks > 1 else Layout(name="1", num_ranks=1)
    ours = combine(run_ranks(compare, layout.num_ranks, layout, exact, list(SMOOTH_LOSSES), "bfloat16"), exact)
    message = f"{ours.worst()}; Hugging Face: {theirs.worst()}"
    # bf16 has 8 bits: an operation errs by up to 2^-8, a log-prob by the root of the number of operations times that. The largest of
    # many tensors' errors is a matter of chance, so the bound is a multiple of what Hugging Face's own rounding does (5 to 9 %).
    assert ours.logprobs <= 2 * theirs.logprobs, message
    assert ours.gradient <= 3 * theirs.gradient, message
    # Errors of the log-probs cancel in their weighted sum; by how much is chance too.
    assert ours.loss <= 2e-2, message
    # Here that is 2^-9 of a weight, what bf16 can hold, and parts of steps; a step left out would be ten times as much.
    assert ours.weight <= 3 * theirs.weight, message
