"""Preference pairs as training rows: a reward model is asked for the score of each response at its last token.

Rows predict the token after each of theirs, so a response gets one token more, which nobody computes: its place is where the score stands.

Shapes: P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.engine.algo.pack import Microbatch, TrainingRow, build_microbatch, supervised_row
from tandem.engine.algo.plan import plan_updates


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRows:
    """The two rows of a pair, and by how much the score of the first is to be ahead."""

    chosen: TrainingRow
    rejected: TrainingRow
    margin: float

    @property
    def num_tokens(self) -> int:
        return self.chosen.num_tokens + self.rejected.num_tokens


def scored_row(prompt_ids: NDArray[np.int32], response_ids: NDArray[np.int32], row_id: int) -> TrainingRow:
    """A row whose only trained position is the response's last token. Raises: ValueError for an empty response."""
    if len(response_ids) == 0:
        raise ValueError(f"row {row_id} has an empty response; there is no token to score")
    row = supervised_row(prompt_ids, np.append(response_ids, response_ids[-1]), row_id)
    row.loss_mask[:-1] = False
    return row


def pair_rows(
    prompt_ids: NDArray[np.int32], chosen_ids: NDArray[np.int32], rejected_ids: NDArray[np.int32], *, margin: float, number: int
) -> PairRows:
    """Rows 2 * number and 2 * number + 1."""
    chosen, rejected = scored_row(prompt_ids, chosen_ids, 2 * number), scored_row(prompt_ids, rejected_ids, 2 * number + 1)
    return PairRows(chosen=chosen, rejected=rejected, margin=margin)


def deal_pairs(
    pairs: Sequence[PairRows], *, dp_rank: int, dp_size: int, microbatch_tokens: int, crossover_tokens: int, seed: int = 0
) -> list[tuple[Microbatch, list[int]]]:
    """The microbatches of one data-parallel rank, and which pairs each holds, by rising number. All ranks have equally many.

    A pair stays together and has one copy of its prompt; its cost counts as that of one sequence of both its responses, which is what
    balances the ranks.
    """
    plan = plan_updates(
        [pair.num_tokens for pair in pairs],
        num_updates=1,
        dp_size=dp_size,
        microbatch_tokens=microbatch_tokens,
        seed=seed,
        crossover_tokens=crossover_tokens,
    )
    dealt = []
    for indices in plan.rows[0][dp_rank] if pairs else ():
        held = sorted(indices, key=lambda i: pairs[i].chosen.row_id)
        rows = [row for i in held for row in (pairs[i].chosen, pairs[i].rejected)]
        dealt.append((build_microbatch(rows, share_prompts=True), held))
    return dealt
