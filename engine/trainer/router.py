"""The router of a mixture-of-experts layer: choice and weights as Hugging Face computes them, load balance, and replay of recorded choices.

Megatron-core's own router chooses by softmax over the chosen logits and knows its balance loss per microbatch only; this one fills the
same place of the layer.

Shapes: L tokens of one context-parallel rank, S tokens of this rank (L, or L / tp under sequence parallelism), E experts, K experts per
token, Q nodes of the microbatch (sequences, or shared prompts and what their responses add).
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import router_gating_linear

from tandem.engine.architecture import Architecture
from tandem.engine.config import TrainerConfig, check
from tandem.engine.routing import choose, scores_of, weigh
from tandem.engine.trainer.batch import LocalBatch, Routing


def check_options(config: TrainerConfig, architecture: Architecture) -> None:
    """Raise ValueError for an option of the routing that the model would ignore."""
    experts = architecture.experts
    has_bias = experts is not None and experts.has_expert_bias
    lacks = f"but {architecture.model_type} has no"
    for name, value, plain in (("moe_aux_loss_coef", config.moe_aux_loss_coef, 0.0), ("replay_routing", config.replay_routing, False)):
        check(experts is not None or value == plain, f"trainer.{name}", value, f"{lacks} experts; set it to {plain}")
    rate = config.moe_bias_update_rate
    check(has_bias or rate == 0, "trainer.moe_bias_update_rate", rate, f"{lacks} expert biases; set it to 0, or use moe_aux_loss_coef")


class Router(MegatronModule):
    """Sends each token to K experts.

    Before each pass `batch` is set to the microbatch that the layer computes (layers.py), also when it is computed again for the
    backward pass.
    """

    batch: LocalBatch
    expert_bias: torch.Tensor | None
    num_sent_E: torch.Tensor

    def __init__(self, config: TransformerConfig, pg_collection: Any, architecture: Architecture) -> None:
        super().__init__(config)
        assert architecture.experts is not None
        self.experts = architecture.experts
        self.sparse_layers = architecture.sparse_layers
        self.tp_group, self.tp_cp_group = pg_collection.tp, pg_collection.tp_cp
        self.sparse_index = 0  # which of the model's sparse layers this is
        device = torch.device(torch.cuda.current_device())
        num_experts = self.experts.num_experts
        self.weight = torch.nn.Parameter(torch.empty(num_experts, config.hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        bias_E = torch.zeros(num_experts, dtype=torch.float32, device=device) if self.experts.has_expert_bias else None
        self.register_buffer("expert_bias", bias_E)
        # Tokens sent to each expert by this rank since the last optimizer step.
        self.register_buffer("num_sent_E", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """The bias stays in fp32 when the model is turned into bf16."""
        bias_E = self.expert_bias
        super()._apply(fn, recurse)
        if bias_E is not None:
            self.expert_bias = bias_E.to(self.weight.device)
        return self

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron tells the layer's number in the whole model, from 1."""
        self.sparse_index = sum(self.sparse_layers[: layer_number - 1])

    def forward(self, hidden: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [S, 1, H] to weights [S, E], 0 where a token is not sent, and the map [S, E] bool of where it is."""
        routing = self._own_part(self.batch.routing)
        logits_SE = router_gating_linear(hidden, self.weight, None, torch.float32).view(-1, self.experts.num_experts)
        scores_SE = scores_of(logits_SE, self.experts)
        chosen_SK = choose(scores_SE, self.expert_bias, self.experts)
        if routing.recorded_LXK is not None:
            recorded_SK = routing.recorded_LXK[:, self.sparse_index]
            chosen_SK = torch.where(recorded_SK >= 0, recorded_SK, chosen_SK)
        chosen_SK = chosen_SK.sort(-1).values  # so that sums do not depend on the order of a record
        weights_SK = weigh(scores_SE, chosen_SK, self.experts)
        map_SE = torch.zeros_like(scores_SE, dtype=torch.bool).scatter_(1, chosen_SK, True)
        if self.training and torch.is_grad_enabled():  # not in a first pass whose activations are computed again
            is_token_S = routing.node_L < routing.num_nodes
            self.num_sent_E += (map_SE & is_token_S[:, None]).sum(0)
            if routing.has_balance_loss:
                weights_SK = _AddLoss.apply(weights_SK, self._balance_loss(scores_SE, routing))
        return torch.zeros_like(scores_SE).scatter(1, chosen_SK, weights_SK), map_SE

    def _own_part(self, routing: Routing | None) -> Routing:
        assert routing is not None
        return routing.part(self.tp_group.rank(), self.tp_group.size()) if self.config.sequence_parallel else routing

    def _balance_loss(self, scores_SE: torch.Tensor, routing: Routing) -> torch.Tensor:
        """This rank's part of the sequence-wise balance loss (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20).

        Of a sequence of T tokens: E / (K T) Σ_e count_e Σ_t s'_te / T, where s' are its scores divided by their sum, and count_e its
        tokens with expert e among their K best scores. Given the counts of all ranks it is linear in the tokens, so each adds its own; a
        shared prompt's tokens for all its sequences.
        """
        experts = self.experts
        shares_SE = scores_SE if experts.scoring == "softmax" else scores_SE / (scores_SE.sum(-1, keepdim=True) + 1e-20)
        with torch.no_grad():
            best_SK = scores_SE.topk(experts.num_experts_per_tok, dim=-1, sorted=False).indices
            counts_QE = scores_SE.new_zeros((routing.num_nodes + 1, experts.num_experts))
            nodes_SK = routing.node_L[:, None].expand_as(best_SK)
            counts_QE.index_put_((nodes_SK, best_SK), counts_QE.new_ones(()), accumulate=True)
            dist.all_reduce(counts_QE, group=self.tp_cp_group)
            factors_QE = routing.balance_factors(counts_QE) * (experts.num_experts / experts.num_experts_per_tok)
        return (shares_SE * factors_QE[routing.node_L]).sum()


class _AddLoss(torch.autograd.Function):
    """The identity on x; in the backward pass `loss` counts as a part of the objective."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        return grad, torch.ones((), dtype=torch.float32, device=grad.device)


def routers_of(chunks: Iterable[torch.nn.Module]) -> list[Router]:
    """The routers of this rank's layers."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]


@torch.no_grad()
def update_expert_biases(routers: list[Router], rate: float, group: dist.ProcessGroup) -> None:
    """After an optimizer step: an expert that was sent more tokens than the mean is biased down by `rate`, one with fewer up.

    The auxiliary-loss-free balancing of DeepSeek-V3 (arXiv:2412.19437, 2.1.2). Counts begin anew.

    Args:
        group: all ranks that hold tokens of these layers (tp, cp and dp).
    """
    if not routers:
        return
    num_sent = torch.stack([router.num_sent_E for router in routers])
    dist.all_reduce(num_sent, group=group)
    for router, num_sent_E in zip(routers, num_sent.double(), strict=True):
        if router.expert_bias is not None:
            router.expert_bias += rate * (num_sent_E.mean() - num_sent_E).sign().float()
        router.num_sent_E.zero_()
