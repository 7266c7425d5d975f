"""Megatron's GPT model whose output is log-probs of the trained tokens, and its weights drawn by name.

Shapes: L tokens of this rank, O positions of this rank (L, but for shared prompts), M trained targets, H hidden width.
"""

import math
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from tandem.engine.architecture import Architecture
from tandem.engine.trainer.batch import LocalBatch
from tandem.engine.trainer.layers import layer_specs
from tandem.engine.trainer.mesh import Mesh
from tandem.engine.trainer.modules import Norm, ScoreHead
from tandem.engine.types import WeightShard
from tandem.kernels.logprob import linear_logprob, linear_logprob_sum
from tandem.kernels.permute import permute

EMBEDDING_STD = 0.02
EMBEDDING = "embedding.word_embeddings.weight"


class PolicyModel(GPTModel):
    """One pipeline chunk. The last one returns [2, O] fp32: log-prob of the target and entropy where it is trained, else 0.

    Where the batch has coefficients of the log-probs, they have no gradient, but their weighted sum has: the first number of a third row.
    With a score head, a reward model's: the score of the token in place of the log-prob, and 0.
    """

    def __init__(self, temperature: float, *, has_score_head: bool, **kwargs: Any) -> None:
        super().__init__(position_embedding_type="none", **kwargs)
        self.temperature, self.has_score_head = temperature, has_score_head
        if has_score_head and self.post_process:
            self.output_layer = ScoreHead(self.config)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, batch: LocalBatch) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # `_preprocess` sees a position embedding of type "none": core attention rotates by position.
        return super().forward(batch.tokens_L[None], None, None, packed_seq_params=batch)  # pyright: ignore[reportArgumentType]

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, packed_seq_params: LocalBatch, **__: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        batch = packed_seq_params
        if self.config.sequence_parallel:
            # What follows returns a whole gradient on every rank, so each takes its own tokens' part of it.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        hidden_LH = hidden_states[:, 0]
        hidden_MH = permute(hidden_LH, batch.copies) if batch.copies is not None else hidden_LH.index_select(0, batch.source_M)
        weighted_sum, *stats = self._scores(hidden_MH) if self.has_score_head else self._logprobs(hidden_MH, batch)
        stats_2M = torch.stack(stats)
        stats_2O = stats_2M.new_zeros((2, batch.num_outputs)).index_copy(1, batch.output_M, stats_2M)
        if weighted_sum is None:
            return stats_2O
        return torch.cat([stats_2O, torch.nn.functional.pad(weighted_sum.view(1, 1), (0, batch.num_outputs - 1))])

    def _logprobs(self, hidden_MH: torch.Tensor, batch: LocalBatch) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        tied = self.share_embeddings_and_output_weights
        weight_VH: Any = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        tp_group: Any = parallel_state.get_tensor_model_parallel_group()
        inputs, options = (hidden_MH, weight_VH, batch.targets_M), {"temperature": self.temperature, "tp_group": tp_group}
        if batch.coefficients_M is not None:
            return linear_logprob_sum(*inputs, batch.coefficients_M, **options)
        return None, *linear_logprob(*inputs, **options)

    def _scores(self, hidden_MH: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        scores_M: torch.Tensor = self.output_layer(hidden_MH)
        return None, scores_M, torch.zeros_like(scores_M)


def build_chunks(config: TransformerConfig, architecture: Architecture, mesh: Mesh, temperature: float) -> list[PolicyModel]:
    """This rank's pipeline chunks, one per virtual stage."""
    specs = layer_specs(architecture)
    num_chunks = mesh.config.vpp
    chunks = []
    for i in range(num_chunks):
        vp_stage = i if num_chunks > 1 else None
        norm: Any = Norm
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=mesh.pp_rank)
        count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=mesh.pp_rank)
        chunks.append(
            PolicyModel(
                temperature,
                has_score_head=architecture.has_score_head,
                config=config,
                transformer_layer_spec=TransformerBlockSubmodules(layer_specs=specs[first : first + count], layer_norm=norm),
                vocab_size=architecture.vocab_size,
                max_sequence_length=architecture.max_position_embeddings,
                pre_process=mesh.pp_rank == 0 and i == 0,
                post_process=mesh.is_last_stage and i == num_chunks - 1,
                share_embeddings_and_output_weights=architecture.tie_word_embeddings,
                vp_stage=vp_stage,
            )
        )
    return chunks


def named_weights(chunk: PolicyModel, mesh: Mesh) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The chunk's parameters under names with global layer and expert indices."""
    for name, parameter in chunk.named_parameters():
        yield _global_name(name, chunk, mesh), parameter


def _global_name(name: str, chunk: PolicyModel, mesh: Mesh) -> str:
    layers: Any = chunk.decoder.layers
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + layers[0].layer_number - 1)
    if "local_experts" in parts:
        i = parts.index("local_experts") + 1
        num_local = (chunk.config.num_moe_experts or 0) // mesh.ep_size
        parts[i] = str(int(parts[i]) + mesh.ep_rank * num_local)
    return ".".join(parts)


def weight_shards(chunks: list[PolicyModel], mesh: Mesh) -> list[WeightShard]:
    """All parameters and expert biases of this rank. A tied output layer on another stage than the embedding is a copy and left out."""
    shards = []
    for chunk in chunks:
        biases = {name: x for name, x in chunk.named_buffers() if name.endswith("router.expert_bias")}
        named = [(_global_name(name, chunk, mesh), bias) for name, bias in biases.items()]
        for name, tensor in [*named_weights(chunk, mesh), *named]:
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                continue
            is_expert = "local_experts" in name
            shards.append(
                WeightShard(
                    name=name,
                    tensor=tensor.data,
                    tp_rank=mesh.etp_rank if is_expert else mesh.tp_rank,
                    tp_size=mesh.etp_size if is_expert else mesh.tp_size,
                )
            )
    return shards


@torch.no_grad()
def initialise(chunks: list[PolicyModel], mesh: Mesh, seed: int, *, only: Collection[str] | None = None) -> None:
    """Draw every weight from a hash of (seed, name), so that it does not depend on the layout of the ranks.

    Normal: embedding 0.02; a matrix 1 / sqrt(its inputs), and those that write into the residual stream also divided by
    sqrt(2 * layers). Norms are 1, biases 0.

    Args:
        only: these weights, by name; None: all.
    """
    for chunk in chunks:
        for name, parameter in named_weights(chunk, mesh):
            if only is not None and name not in only:
                continue
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                name = EMBEDDING
            is_expert = "local_experts" in name
            size, rank = (mesh.etp_size, mesh.etp_rank) if is_expert else (mesh.tp_size, mesh.tp_rank)
            # Megatron marks the parameters that it splits; the router has no mark.
            is_split = size > 1 and hasattr(parameter, "partition_dim")
            shape = list(parameter.shape)
            if is_split:
                shape[parameter.partition_dim] *= size  # pyright: ignore[reportAttributeAccessIssue]
            std = EMBEDDING_STD if name == EMBEDDING else shape[1] ** -0.5
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                std /= math.sqrt(2 * chunk.config.num_layers)
            # A CPU generator of torch takes the lower 32 bits only; the factor (2^32 over the golden ratio) spreads small seeds over them.
            generator = torch.Generator().manual_seed((seed * 0x9E3779B1 ^ zlib.crc32(name.encode())) & 0xFFFFFFFF)
            whole = torch.randn(shape, generator=generator) * std
            if is_split:  # `stride` matrices lie one after the other (gate and up), and each is split
                dim, stride = parameter.partition_dim, parameter.partition_stride  # pyright: ignore[reportAttributeAccessIssue]
                whole = torch.cat([part.chunk(size, dim)[rank] for part in whole.chunk(stride, dim)], dim)
            parameter.copy_(whole)
