"""Scored groups, spread over the leaders, become each data-parallel rank's packed microbatches.

No process sees all tokens: only lengths are gathered; rows travel from the leader that holds them to the ranks that train on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.algo.advantage import Scores, score_groups
from tandem.engine.algo.pack import Microbatch, TrainingRow, build_microbatch, rows_of
from tandem.engine.algo.plan import Prompts, plan_updates
from tandem.engine.build import Parts
from tandem.engine.run import Run
from tandem.engine.types import Group
from tandem.kernels.policy_loss import normaliser_of


@dataclass(frozen=True, kw_only=True)
class DealtBatch:
    """What one rank trains on in one iteration."""

    updates: list[list[Microbatch]]  # [update][microbatch], as many on every rank
    normalisers: list[float]  # per update, over all ranks: what the summed loss is divided by
    scores: Scores  # of this leader's groups


def deal_updates(run: Run, parts: Parts, groups: Sequence[Group], step: int) -> DealtBatch:
    """Score this leader's groups, plan with all ranks, and exchange rows. A collective.

    A loss that is averaged over responses counts every response of the iteration, also those dropped for want of a signal, so
    that a batch of solved prompts takes smaller steps instead of amplifying the few that are left.
    """
    config, mesh = run.config, parts.mesh
    scores = score_groups(
        groups,
        loss=config.loss,
        reward=config.reward,
        length_weight=config.length_penalty.weight_at(step),
        max_response_tokens=config.rollout.max_response_tokens,
    )
    regularised = config.loss.variant in ("mirror_descent", "token_level") and config.loss.tau > 0
    num_responses_R = run.gather(sum(len(group.responses) for group in groups))
    row_id = sum(num_responses_R[: run.rank])
    rows = []
    for group, of_group in zip(groups, scores.advantages_of_groups(), strict=True):
        rows += rows_of(group, of_group, step, config.loss.stale_segments, first_row_id=row_id, regularised=regularised)
        row_id += len(group.responses)

    of_ranks = run.gather([(row.num_tokens, int(row.loss_mask.sum()), row.prefix_hash, len(row.prompt_ids)) for row in rows])
    sizes = [size for of_rank in of_ranks for size in of_rank]
    first = sum(len(of_rank) for of_rank in of_ranks[: run.rank])
    plan = plan_updates(
        [num_positions for num_positions, *_ in sizes],
        num_updates=config.trainer.updates_per_iteration,
        dp_size=mesh.dp_size,
        microbatch_tokens=config.trainer.microbatch_tokens,
        seed=config.seed + step,
        crossover_tokens=12 * parts.hidden_size,
        prompts=Prompts(hashes_R=[size[2] for size in sizes], lengths_R=[size[3] for size in sizes]),
        share_prompts=config.trainer.share_prompts,
    )
    dp_rank_of_row = {
        row: dp_rank for update in plan.rows for dp_rank, bins in enumerate(update) for microbatch in bins for row in microbatch
    }
    parcels = [
        [(first + i, row) for i, row in enumerate(rows) if dp_rank_of_row[first + i] == mesh.dp_rank_of[rank]]
        for rank in range(run.num_ranks)
    ]
    received = dict(pair for parcel in run.exchange(parcels) for pair in parcel)
    updates = [
        [build_microbatch([received[row] for row in rows], share_prompts=plan.shares_prompts) for rows in update[mesh.dp_rank]]
        for update in plan.rows
    ]
    if plan.shares_prompts:
        packed = [microbatch for update in updates for microbatch in update]
        num_positions, num_tokens = sum(m.num_positions for m in packed), sum(m.num_tokens for m in packed)
        run.log.event("prompts are shared", step=step, positions=num_positions, computed_tokens=num_tokens)
    if normaliser_of(config.loss.variant) == "tokens":
        normalisers = [float(sum(sizes[row][1] for bins in update for b in bins for row in b)) for update in plan.rows]
    else:
        normalisers = [sum(num_responses_R) / config.trainer.updates_per_iteration] * plan.num_updates
    return DealtBatch(updates=updates, normalisers=normalisers, scores=scores)


def deal_examples(run: Run, parts: Parts, examples: Sequence[TrainingRow], seed: int) -> list[Microbatch]:
    """This rank's microbatches of one supervised batch that every rank holds alike."""
    plan = plan_updates(
        [row.num_tokens for row in examples],
        num_updates=1,
        dp_size=parts.mesh.dp_size,
        microbatch_tokens=run.config.trainer.microbatch_tokens,
        seed=seed,
        crossover_tokens=12 * parts.hidden_size,
    )
    return [build_microbatch([examples[row] for row in microbatch]) for microbatch in plan.rows[0][parts.mesh.dp_rank]]
