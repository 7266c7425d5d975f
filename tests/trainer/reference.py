"""What one Hugging Face model in one process makes of a batch: log-probs, losses, every gradient, and weights after two AdamW steps.

In fp64 throughout, so that what the trainer differs by is the trainer's own rounding. The losses are written out here per row, apart
from `tandem.kernels.policy_loss`. Tensors have their names on disk.

Shapes: P prompt and N response tokens of a row.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from tandem.engine.algo.pack import TrainingRow
from tandem.engine.config import LossConfig, OptimizerConfig
from tests.trainer.families import VOCAB, disk_gradients, disk_weights, hf_model

TEMPERATURE = 0.8
# Clipping and weight decay take part: the norm is over the whole model, and only matrices decay. eps is above the rounding error of a
# clipped gradient (a few 1e-4 in size), so that no element moves by a whole lr whose gradient is rounding error.
ADAM = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.1, eps=1e-6)
CROSS_ENTROPY = "cross entropy"
# None is cross entropy of the trained tokens.
LOSSES: Mapping[str, LossConfig | None] = {
    CROSS_ENTROPY: None,
    "mirror descent": LossConfig(tau=0.3),
    "mirror descent, stale tokens corrected": LossConfig(tau=0.3, stale_segments="correct"),
    "mirror descent, reference of the rollout": LossConfig(tau=0.3, reference="rollout"),
    "rest": LossConfig(variant="rest"),
    "grpo": LossConfig(variant="grpo"),
    "ppo_clip": LossConfig(variant="ppo_clip"),
    "token level": LossConfig(variant="token_level", tau=0.3),
    "gspo": LossConfig(variant="gspo", clip_low=0.1, clip_high=0.1),
}
STEPPED = "mirror descent"  # the loss of the two steps
# (P, N); no number of ranks divides them; one response is a single token.
LENGTHS = [(3, 8), (5, 13), (2, 1), (7, 4), (4, 17), (6, 9), (1, 2), (3, 11)]
# The second step has fewer rows, so that some data-parallel ranks have none.
NUM_ROWS_OF_STEPS = (len(LENGTHS), 3)


def training_rows(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[TrainingRow]:
    """Random rows of (prompt, response) lengths. The first third of a response is stale; every other row leaves that out of the loss."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, (num_prompt, num_response) in enumerate(lengths):
        on_policy = np.arange(num_response) >= num_response // 3
        rows.append(
            TrainingRow(
                prompt_ids=rng.integers(0, VOCAB, num_prompt).astype(np.int32),
                response_ids=rng.integers(0, VOCAB, num_response).astype(np.int32),
                behaviour_logprobs=(-6 * rng.random(num_response)).astype(np.float32),
                loss_mask=on_policy if i % 2 else np.ones(num_response, dtype=np.bool_),
                on_policy=on_policy,
                advantage=float(rng.normal()),
                row_id=i,
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of one loss on all rows."""

    loss: float
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """`logprobs` are of all rows' response tokens; `reference_logprobs` those of the policy at the iteration's start (made up)."""

    hf_config: Mapping[str, Any]
    rows: Sequence[TrainingRow]
    weights: Mapping[str, torch.Tensor]
    logprobs: Mapping[int, torch.Tensor]  # [N] by row id
    entropies: Mapping[int, torch.Tensor]
    reference_logprobs: Mapping[int, torch.Tensor]
    gradients: Mapping[str, Gradients]  # by loss
    stepped: Mapping[str, torch.Tensor]  # weights after two steps
    grad_norm: float  # of the first step, before clipping


def normaliser_of(loss: LossConfig | None, rows: Sequence[TrainingRow]) -> float:
    """What the rows' summed loss is divided by: responses, or trained tokens."""
    of_tokens = loss is None or loss.variant in ("ppo_clip", "token_level")
    return float(sum(row.loss_mask.sum() for row in rows) if of_tokens else len(rows))


def row_loss(loss: LossConfig | None, row: TrainingRow, logprobs_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """The loss of one response as the papers have it, summed in fp64."""
    mask_N = torch.from_numpy(row.loss_mask)
    if not mask_N.any():
        return logprobs_N.double().sum() * 0
    if loss is None:
        return -logprobs_N[mask_N].double().sum()
    behaviour_N = torch.from_numpy(row.behaviour_logprobs)
    if loss.reference == "rollout":
        reference_N, weight_N = behaviour_N, (logprobs_N.detach() - behaviour_N).exp().clamp(max=loss.importance_cap)
    elif loss.stale_segments == "correct":
        ratio_N = (reference_N - behaviour_N).exp().clamp(max=loss.importance_cap)
        weight_N = torch.where(torch.from_numpy(row.on_policy), 1.0, ratio_N)
    else:
        weight_N = torch.ones_like(logprobs_N)
    policy, reference, weight = logprobs_N[mask_N].double(), reference_N[mask_N].double(), weight_N[mask_N].double()
    advantage = row.advantage

    def clipped(ratio: torch.Tensor) -> torch.Tensor:
        return torch.minimum(ratio * advantage, ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high) * advantage)

    match loss.variant:
        case "mirror_descent":
            return -(advantage * (weight * policy).sum() - loss.tau / 2 * (weight * (policy - reference)).sum() ** 2)
        case "rest":
            return -advantage * (weight * policy).sum()
        case "gspo":
            return -clipped((policy - reference).mean().exp()) * weight.mean()
        case "grpo":
            return -(weight * clipped((policy - reference).exp())).mean()
        case "ppo_clip":
            return -(weight * clipped((policy - reference).exp())).sum()
        case "token_level":
            bounded = (policy - reference).exp().clamp(1 - loss.clip_low, 1 + loss.clip_high)
            return -(weight * (advantage * bounded - loss.tau * (policy - reference) ** 2)).sum()


class _Float64(TorchFunctionMode):
    """float64 wherever float32 is asked for: transformers casts to that in norms, rotary embeddings, softmax and routers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        def wider(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wider, args), **{name: wider(x) for name, x in (kwargs or {}).items()})


def _statistics(model: torch.nn.Module, row: TrainingRow) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the response tokens, [N] each, fp64 or (of a model in less) fp32; the sequence on its own."""
    if not row.num_tokens:
        return torch.zeros(0), torch.zeros(0)
    ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))
    is_exact = next(model.parameters()).dtype == torch.float64
    with _Float64() if is_exact else contextlib.nullcontext():
        logits = model(ids[None, :-1]).logits[0, len(row.prompt_ids) - 1 :]
    logits = (logits if is_exact else logits.float()) / TEMPERATURE
    all_logprobs = logits.log_softmax(-1)
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    return all_logprobs.gather(1, ids[len(row.prompt_ids) :, None])[:, 0], entropies.detach()


@contextlib.contextmanager
def _router_logits(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that every forward pass of a router appends its logits [T, E] to."""
    logits: list[torch.Tensor] = []

    def note(router: Any, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
        logits.append(inputs[0].flatten(0, -2).to(router.weight.dtype) @ router.weight.T)

    hooks = [module.register_forward_hook(note) for name, module in model.named_modules() if name.endswith("mlp.gate")]
    yield logits
    for hook in hooks:
        hook.remove()


def _balance_loss(logits_TE: torch.Tensor, config: Any) -> torch.Tensor:
    """Sequence-wise balance loss of one layer (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20)."""
    scores_TE = logits_TE.sigmoid() if config.model_type == "deepseek_v3" else logits_TE.softmax(-1)
    counts_E = torch.bincount(scores_TE.topk(config.num_experts_per_tok).indices.flatten(), minlength=scores_TE.shape[1])
    fraction_E = counts_E * scores_TE.shape[1] / (config.num_experts_per_tok * len(scores_TE))
    return (fraction_E * (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)).sum()


def make_reference(
    family: str,
    num_layers: int = 4,
    rows: Sequence[TrainingRow] | None = None,
    losses: Mapping[str, LossConfig | None] = LOSSES,
    dtype: torch.dtype = torch.float64,
    weights_dtype: torch.dtype = torch.float32,
    reference_logprobs: Mapping[int, torch.Tensor] | None = None,
    aux_loss_coef: float = 0.0,
) -> Reference:
    """Run the family's tiny model.

    Args:
        dtype: of weights and activations; AdamW steps copies of the weights in fp64, or fp32 for a model in less.
        weights_dtype: the weights at the start are rounded to this first.
        aux_loss_coef: weight of the balance loss, which takes part in the gradients of `losses` and not in their values or the two steps.
        reference_logprobs: by row id, [N] fp32. None: the model's own with noise, far enough from it for some ratios to be clipped.
    """
    rows = training_rows(LENGTHS) if rows is None else rows
    model: Any = hf_model(family, num_hidden_layers=num_layers)
    model.to(weights_dtype).to(dtype)
    config = model.config
    exact = torch.promote_types(dtype, torch.float32)
    masters = {name: parameter.detach().to(exact).clone() for name, parameter in model.named_parameters()}
    weights = disk_weights(model)
    generator = torch.Generator().manual_seed(3)
    logprobs, entropies, references = {}, {}, {}
    for row in rows:
        found, entropies[row.row_id] = _statistics(model, row)
        logprobs[row.row_id] = found.detach()
        noise = 0.3 * torch.randn(len(found), generator=generator)
        references[row.row_id] = found.detach().float() + noise if reference_logprobs is None else reference_logprobs[row.row_id]

    def backward(loss: LossConfig | None, rows: Sequence[TrainingRow], aux_loss_coef: float = 0.0) -> float:
        model.zero_grad()
        total, balance = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=exact)
        with _router_logits(model) as logits_of_layers:
            for row in rows:
                total = total + row_loss(loss, row, _statistics(model, row)[0], references[row.row_id])
                if aux_loss_coef:
                    balance = balance + sum(_balance_loss(logits_TE, config) for logits_TE in logits_of_layers)
                logits_of_layers.clear()
        total = total / normaliser_of(loss, rows)
        (total + aux_loss_coef * balance / sum(row.num_tokens > 0 for row in rows)).backward()
        return total.item()

    gradients = {}
    for name, loss in losses.items():
        value = backward(loss, rows, aux_loss_coef)
        gradients[name] = Gradients(loss=value, tensors=disk_gradients(model))

    groups = {True: [], False: []}
    for name, master in masters.items():
        groups[master.dim() > 1 and not name.endswith("bias")].append(master)
    settings: Any = {"lr": ADAM.lr, "betas": (ADAM.beta1, ADAM.beta2), "eps": ADAM.eps}
    adam = torch.optim.AdamW(
        [{"params": groups[decays], "weight_decay": ADAM.weight_decay if decays else 0.0} for decays in groups], **settings
    )
    grad_norms = []
    for num_rows in NUM_ROWS_OF_STEPS:
        backward(LOSSES[STEPPED], rows[:num_rows])
        for name, parameter in model.named_parameters():
            masters[name].grad = torch.zeros_like(masters[name]) if parameter.grad is None else parameter.grad.to(exact)
        grad_norms.append(torch.nn.utils.clip_grad_norm_(list(masters.values()), ADAM.clip_grad).item())
        adam.step()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name])
    return Reference(
        hf_config=config.to_dict(),
        rows=rows,
        weights=weights,
        logprobs=logprobs,
        entropies=entropies,
        reference_logprobs=references,
        gradients=gradients,
        stepped=disk_weights(model),
        grad_norm=grad_norms[0],
    )
