"""The trainer: a Megatron-core model, its optimizer, and the passes over microbatches.

Every rank of a data-parallel index (its tp, pp and cp ranks) is handed the same microbatches; all methods that compute are collectives.

Shapes: T positions of a microbatch, O positions of one context-parallel rank, R responses.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from tandem.engine.algo.pack import FILLER_ROW_ID, Microbatch, build_microbatch
from tandem.engine.architecture import Architecture
from tandem.engine.config import LossConfig, OptimizerConfig, TrainerConfig
from tandem.engine.mesh_rules import splits_heads
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer import optimizer as optimizers
from tandem.engine.trainer.batch import LocalBatch, RoutingOptions, localise, num_local_tokens
from tandem.engine.trainer.context_parallel import gather_replicated
from tandem.engine.trainer.finite import FiniteCheck, NonFiniteError
from tandem.engine.trainer.layers import transformer_config
from tandem.engine.trainer.memory import TrainerMemory
from tandem.engine.trainer.mesh import Mesh, check_schedule
from tandem.engine.trainer.model import PolicyModel, build_chunks, initialise, weight_shards
from tandem.engine.trainer.reductions import from_last_stage, sum_gradients
from tandem.engine.trainer.router import check_options, routers_of, update_expert_biases
from tandem.engine.trainer.state import hold_values, set_num_steps, sharded_optimizer
from tandem.engine.types import WeightShard


class MegatronTrainer:
    """Owns this rank's part of the model and of the optimizer."""

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        mesh: Mesh,
        config: TrainerConfig,
        loss: LossConfig,
        temperature: float,
        seed: int | None,
    ) -> None:
        """Build model and optimizer.

        Args:
            hf_config: config.json of a model that `Architecture.from_hf` reads.
            temperature: of the rollout; log-probs are of the softmax over logits / temperature.
            seed: of the random weights; the same for every layout of the ranks. None leaves them unset: write into the tensors of
                `weight_shards` and call `weights_changed`.
        Raises: ValueError for a model that the layers do not compute.
        """
        self._hf_config, self._architecture = dict(hf_config), Architecture.from_hf(hf_config)
        check_options(config, self._architecture)
        self._splits_heads = splits_heads(config.cp_attention, mesh.config, self._architecture)
        self.mesh, self.config, self.loss = mesh, config, loss
        # All microbatches of a pass have one length where stages or experts cannot tell each other theirs.
        self._one_length = mesh.config.vpp > 1 or (self._architecture.num_experts > 0 and config.moe_dispatcher == "allgather")
        self._model_config = transformer_config(
            self._architecture, mesh, config, variable_lengths=mesh.pp_size > 1 and not self._one_length
        )
        check_schedule(self._model_config)
        device = torch.empty(0, device=torch.cuda.current_device()).device
        self._inverse_frequencies_D = self._architecture.rope.inverse_frequencies_D(device)
        self._chunks = build_chunks(self._model_config, self._architecture, mesh, temperature)
        if seed is not None:
            initialise(self._chunks, mesh, seed)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=config.distributed_optimizer,
            overlap_grad_reduce=config.overlap_grad_reduce,
            grad_reduce_in_fp32=True,
        )
        wrapped = [Float16Module(self._model_config, chunk) for chunk in self._chunks] if self._model_config.bf16 else self._chunks
        self._ddp = [
            DistributedDataParallel(self._model_config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(wrapped)
        ]
        self._model_config.finalize_model_grads_func = sum_gradients
        if config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self._ddp]
            self._model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer = optimizers.build_optimizer(config, self._ddp)
        self.memory = TrainerMemory(self._ddp, self._optimizer, device)
        self._lr, self._optimizer_config = config.optimizer.lr, config.optimizer
        self._num_skipped = 0  # steps in a row, for numbers that are none

    @property
    def chunks(self) -> list[PolicyModel]:
        """This rank's pipeline chunks, for tools that look into them."""
        return self._chunks

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """The Hugging Face config.json of the model, as a dictionary."""
        return self._hf_config

    def weight_shards(self) -> list[WeightShard]:
        """All parameters of this rank, live (those that sleep come back), in a fixed order. After writing call `weights_changed`."""
        self.memory.wake_parameters()
        return weight_shards(self._chunks, self.mesh)

    def weights_changed(self) -> None:
        """Take over weights that were written into the tensors of `weight_shards` (a tied output layer and master weights)."""
        self.memory.check_awake("weights_changed")
        if self._architecture.tie_word_embeddings and self.mesh.pp_size > 1:
            self._copy_tied_embedding()
        self._optimizer.reload_model_params()

    @torch.no_grad()
    def _copy_tied_embedding(self) -> None:
        if parallel_state.is_rank_in_embedding_group():
            chunk = self._chunks[0] if self.mesh.pp_rank == 0 else self._chunks[-1]
            weight = chunk.shared_embedding_or_output_weight()
            group: Any = parallel_state.get_embedding_group()
            dist.broadcast(weight.data, dist.get_global_rank(group, 0), group=group)

    def set_learning_rate(self, lr: float) -> None:
        """Learning rate of the steps from now on."""
        self._lr = lr
        optimizers.set_learning_rate(self._optimizer, lr)

    def set_optimizer_config(self, config: OptimizerConfig) -> None:
        """Betas, eps, weight decay and clipping of the steps from now on (not the learning rate)."""
        self._optimizer_config = config
        optimizers.set_optimizer_config(self._optimizer, config)

    def reset_optimizer(self) -> None:
        """Fresh moments and step count."""
        self.memory.check_awake("reset_optimizer")
        optimizers.reset_state(self._optimizer)

    # Passes over microbatches

    @torch.no_grad()
    def logprobs(self, microbatches: Sequence[Microbatch]) -> list[torch.Tensor]:
        """Log-probs of the targets where loss_mask_T is set, 0 elsewhere: [T] fp32 per microbatch, on every rank of the dp index."""
        self.memory.check_awake("logprobs")
        for chunk in self._ddp:
            chunk.eval()
        found = self._run(microbatches, lambda batch, stats_2T, index: (stats_2T.sum() * 0, stats_2T[0]), forward_only=True)
        for chunk in self._ddp:
            chunk.train()
        if self.mesh.pp_size > 1:
            found = self._logprobs_from_last_stage(found, [microbatch.num_positions for microbatch in microbatches])
        return found[: len(microbatches)]

    def update(
        self,
        updates: Sequence[Sequence[Microbatch]],
        normalisers: Sequence[float],
        reference_logprobs: Sequence[Sequence[torch.Tensor]] | None,
        references_are_own: bool = False,
    ) -> dict[str, float]:
        """One optimizer step per element of `updates`.

        Args:
            updates: this dp index's microbatches of each step; the number of steps is the same on all ranks.
            normalisers: of each step, over all ranks: the responses or trained tokens of the whole step
                (`kernels.policy_loss.normaliser_of`).
            reference_logprobs: of each microbatch, by the policy at the iteration's start. None: the rollout's are taken.
            references_are_own: they are what `logprobs` returns now, so that the first step's coefficients are known beforehand.
        Returns: means over all tokens and ranks, the same on every rank: loss (before loss.scale), grad_norm, entropy, kl, and
            logprob_diff_mean and logprob_diff_max: |log π - behaviour| on on-policy tokens in the first step, where the policy is
            still the one that generated them, so that any difference is the engines'.
            Updates with a loss or gradient that is no number are left out and counted as skipped_updates, with on_nonfinite="skip".
        Raises: NonFiniteError naming rank, microbatch and tensor.
        """
        device = self._inverse_frequencies_D.device
        all_sums, grad_norms = [], []
        for step, (microbatches, normaliser) in enumerate(zip(updates, normalisers, strict=True)):
            references = [None] * len(microbatches) if reference_logprobs is None else [x.to(device) for x in reference_logprobs[step]]
            is_own = references_are_own and step == 0
            objectives = [losses.Policy(config=self.loss, normaliser=normaliser, reference_T=x, is_reference=is_own) for x in references]
            stepped = self.step(microbatches, objectives, f"update {step}")
            if stepped is not None:
                all_sums.append(stepped[0])
                grad_norms.append(stepped[1])
        if not updates:
            return {}
        num_skipped = float(len(updates) - len(all_sums))
        if not all_sums:
            return {"skipped_updates": num_skipped, "learning_rate": self._lr, "tokens": 0.0}
        total, first = torch.stack(all_sums).sum(0), all_sums[0]
        tokens, on_policy = max(1.0, total[losses.TOKENS].item()), max(1.0, first[losses.ON_POLICY].item())
        return {
            "loss": total[losses.LOSS].item() / len(all_sums),
            "grad_norm": sum(grad_norms) / len(grad_norms),
            "entropy": total[losses.ENTROPY].item() / tokens,
            "kl": total[losses.KL].item() / tokens,
            "logprob_diff_mean": first[losses.MISMATCH].item() / on_policy,
            "logprob_diff_max": first[losses.MISMATCH_MAX].item(),
            "learning_rate": self._lr,
            "tokens": total[losses.TOKENS].item(),
            "skipped_updates": num_skipped,
        }

    def sft_step(self, microbatches: Sequence[Microbatch], num_target_tokens: int) -> dict[str, float]:
        """One optimizer step on the cross entropy of the trained tokens, `num_target_tokens` of them over all ranks.

        Returns: loss and entropy in nats a token, grad_norm, learning_rate, tokens; the same on every rank. Of a step that was skipped,
            loss and grad_norm are NaN.
        """
        objective = losses.Supervised(normaliser=float(num_target_tokens))
        stepped = self.step(microbatches, [objective] * len(microbatches), "supervised step")
        if stepped is None:
            return {"loss": math.nan, "grad_norm": math.nan, "learning_rate": self._lr, "tokens": 0.0}
        sums, grad_norm = stepped
        return {
            "loss": sums[losses.LOSS].item(),
            "grad_norm": grad_norm,
            "entropy": sums[losses.ENTROPY].item() / max(1.0, sums[losses.TOKENS].item()),
            "learning_rate": self._lr,
            "tokens": sums[losses.TOKENS].item(),
        }

    def step(
        self, microbatches: Sequence[Microbatch], objectives: Sequence[losses.Objective], what: str
    ) -> tuple[torch.Tensor, float] | None:
        """Gradient and optimizer step; (sums over all ranks, gradient norm before clipping), or None for a step that was skipped."""
        try:
            sums = self.accumulate_gradients(microbatches, objectives, what)
        except NonFiniteError as error:
            self._num_skipped += 1
            if self.config.on_nonfinite == "stop":
                raise
            if self._num_skipped > (limit := self.config.max_nonfinite_skips):
                raise NonFiniteError(f"more than trainer.max_nonfinite_skips={limit} updates in a row: {error}") from error
            if self.mesh.rank == 0:
                print(f"{what} is skipped: {error}", flush=True)
            return None
        self._num_skipped = 0
        _, grad_norm, _ = self._optimizer.step()
        if self.config.moe_bias_update_rate:
            holders: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            update_expert_biases(routers_of(self._chunks), self.config.moe_bias_update_rate, holders)
        return sums, float(grad_norm)

    def accumulate_gradients(
        self, microbatches: Sequence[Microbatch], objectives: Sequence[losses.Objective], what: str = "step"
    ) -> torch.Tensor:
        """Leave the whole batch's gradient in the parameters' main_grad; returns the sums of `loss.microbatch_loss` over all ranks.

        Raises: NonFiniteError on all ranks.
        """
        self.memory.check_awake(what)
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        for router in routers_of(self._chunks):
            router.num_sent_E.zero_()
        filler, finite = losses.Supervised(normaliser=1.0), FiniteCheck(self.mesh, what)

        def loss_of(batch: LocalBatch, stats_2T: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            objective = objectives[index] if index < len(objectives) else filler
            loss, sums = losses.microbatch_loss(objective, batch.whole, stats_2T[0], stats_2T[1])
            finite.check_loss(index, batch.whole, loss, stats_2T[0])
            return loss, sums

        found = self._run(microbatches, loss_of, objectives if self.config.single_pass_logprobs else (), forward_only=False)
        finite.finish(self._chunks, self._ddp)
        return self._sum_over_ranks(found)

    def _sum_over_ranks(self, found: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add the microbatches' sums over data-parallel ranks; known on the last stage, then told to the others."""
        device = self._inverse_frequencies_D.device
        per_microbatch = torch.stack(list(found)) if found else torch.zeros((1, losses.NUM_SUMS), dtype=torch.float64, device=device)
        sums, largest = per_microbatch.sum(0), per_microbatch[:, losses.MISMATCH_MAX].amax()
        group = parallel_state.get_data_parallel_group()
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums[losses.MISMATCH_MAX] = largest
        if self.mesh.pp_size > 1:
            from_last_stage(sums)
        return sums

    def _run(
        self,
        microbatches: Sequence[Microbatch],
        consume: Callable[[LocalBatch, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
        objectives: Sequence[losses.Objective] = (),
        *,
        forward_only: bool,
    ) -> list[torch.Tensor]:
        """Megatron's schedule over the microbatches. Returns the second result of `consume` for each, on the last stage.

        `consume` gets a microbatch's log-probs and entropies, [2, T], and its number. Objectives tell coefficients known beforehand.
        """
        filled, min_tokens = self._fill_up(microbatches)
        make = functools.partial(
            localise,
            mesh=self.mesh,
            inverse_frequencies_D=self._inverse_frequencies_D,
            min_tokens=min_tokens,
            rope_scaling=self._architecture.rope.attention_scaling,
            routing=self._routing_options(microbatches, forward_only=forward_only),
            splits_heads=self._splits_heads,
        )
        # Virtual stages of one rank see the same microbatches: make each once.
        prepared = [make(microbatch) for microbatch in filled] if len(self._ddp) > 1 else None

        def batches() -> Iterator[tuple[int, LocalBatch]]:
            made = prepared if prepared is not None else map(make, filled)
            return enumerate(map(losses.with_coefficients, made, [*objectives, *[None] * (len(filled) - len(objectives))]))

        cp_group: Any = parallel_state.get_context_parallel_group()

        def forward_step(iterator: Iterator[tuple[int, LocalBatch]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            index, batch = next(iterator)

            def loss_func(stats_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                stats_2T = stats_O[:2]
                if batch.order_T is not None:
                    stats_2T = gather_replicated(stats_2T.T, batch.order_T, cp_group).T
                loss, kept = consume(batch, stats_2T, index)
                return losses.with_gradient(loss, stats_O), torch.zeros((), dtype=torch.int), kept

            return model(batch), loss_func

        run: Callable[..., list[torch.Tensor]] = get_forward_backward_func()
        return run(
            forward_step_func=forward_step,
            data_iterator=[batches() for _ in self._ddp] if len(self._ddp) > 1 else batches(),
            model=self._ddp if len(self._ddp) > 1 else self._ddp[0],
            num_microbatches=len(filled),
            seq_length=max(1, min_tokens) * self.mesh.cp_size,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _routing_options(self, microbatches: Sequence[Microbatch], *, forward_only: bool) -> RoutingOptions | None:
        """What this pass asks of the routers; the balance loss is a mean over the sequences of all ranks. A collective."""
        experts, weight = self._architecture.experts, 0.0
        if experts is None:
            return None
        if self.config.moe_aux_loss_coef and not forward_only:
            count = torch.zeros(1, dtype=torch.int64, device=self._inverse_frequencies_D.device)
            count += sum(int((microbatch.row_ids_R != FILLER_ROW_ID).sum()) for microbatch in microbatches)
            dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
            weight = self.config.moe_aux_loss_coef / max(1, int(count))
        return RoutingOptions(
            num_sparse_layers=sum(self._architecture.sparse_layers),
            num_experts=experts.num_experts,
            num_experts_per_tok=experts.num_experts_per_tok,
            replay=self.config.replay_routing,
            balance_weight=weight,
        )

    def _fill_up(self, microbatches: Sequence[Microbatch]) -> tuple[list[Microbatch], int]:
        """Fillers so that all data-parallel ranks run equally many, and the length they are padded to (0: each its own)."""
        longest = max((num_local_tokens(m, self.mesh) for m in microbatches), default=1) if self._one_length else 0
        agreed = torch.tensor([max(1, len(microbatches)), longest], device=self._inverse_frequencies_D.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
        count, longest = (int(x) for x in agreed)
        if self.mesh.config.vpp > 1:  # the interleaved schedule takes whole rounds
            count = -(-count // self.mesh.pp_size) * self.mesh.pp_size
        filler = build_microbatch([])
        if self._one_length:
            longest = max(longest, num_local_tokens(filler, self.mesh))
        return [*microbatches, *[filler] * (count - len(microbatches))], longest

    def _logprobs_from_last_stage(self, found: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
        total, device = sum(lengths), self._inverse_frequencies_D.device
        joined = torch.cat(list(found))[:total] if self.mesh.is_last_stage else torch.empty(total, device=device)
        from_last_stage(joined)
        return list(joined.split(list(lengths)))

    # Checkpoints

    def sharded_state_dict(self, *, optimizer: bool = True) -> dict[str, Any]:
        """For `megatron.core.dist_checkpointing`: model and optimizer, loadable under any other layout of the ranks.

        The tensors in it are the live ones: `dist_checkpointing.load` writes into them, and `load_sharded` must follow.
        Of a trainer that sleeps they are its copies on the host, for saving only.
        """
        with self.memory.read_on_host():
            state: dict[str, Any] = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(self._chunks)}
            if optimizer:
                state["optimizer"] = sharded_optimizer(self._optimizer, state)
            apply_factories(state)  # so that loading need not put their parts together again
            hold_values(state)
        return state

    def load_sharded(self, state: Mapping[str, Any]) -> None:
        """Take over what `dist_checkpointing.load` made of `sharded_state_dict`.

        Without the key "optimizer" the model alone was loaded, and the moments stay. (`dist_checkpointing.load` adds that key also where
        it was not asked for; `load_latest` removes it.) Learning rate, betas, eps and weight decay stay this trainer's.
        """
        self.memory.check_awake("load_sharded")
        if "optimizer" in state:
            set_num_steps(self._optimizer, state["optimizer"]["step"])
        else:
            self.weights_changed()
