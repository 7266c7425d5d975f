"""What a model computes on a batch, layer by layer, forward and backward, and the batch itself.

Each process writes the parts that it holds, with where they lie in whole tensors: tokens of all rows laid end to end, and tensors under
their Hugging Face names. Whatever the layout, the same element then lies in the same place.

Shapes: T tokens of a microbatch, L tokens of a rank, H hidden width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tandem.engine.algo.pack import FILLER_ROW_ID, Microbatch, TrainingRow

# Where a part lies in its tensor: whole rows by their numbers, or a block (start, stop of every dimension).
Place = torch.Tensor | tuple[tuple[int, int], ...]
# ("forward" or "backward", name) → the parts that one process holds.
Recording = dict[tuple[str, str], list[tuple[Place, torch.Tensor]]]
FORWARD, BACKWARD = "forward", "backward"
EMBEDDING, FINAL_NORM, LOGPROBS = "embedding", "final norm", "log-probs"


def layer_name(index: int, part: str = "output") -> str:
    """The name of a layer's attention, mlp or output."""
    return f"layer {index} {part}"


def make_rows(vocab_size: int, num_rows: int, longest: int, seed: int) -> list[TrainingRow]:
    """Random rows of uneven lengths; every response token is trained on."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        prompt, response = rng.integers(1, max(2, longest // 4)), rng.integers(1, longest + 1)
        prompt_ids, response_ids = rng.integers(0, vocab_size, prompt), rng.integers(0, vocab_size, response)
        rows.append(training_row(prompt_ids, response_ids, row_id=i))
    return rows


def training_row(prompt_ids: Any, response_ids: Any, *, row_id: int) -> TrainingRow:
    """A row whose response is trained on by cross entropy."""
    num_response = len(response_ids)
    return TrainingRow(
        prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
        response_ids=np.asarray(response_ids, dtype=np.int32),
        behaviour_logprobs=np.zeros(num_response, dtype=np.float32),
        loss_mask=np.ones(num_response, dtype=np.bool_),
        on_policy=np.ones(num_response, dtype=np.bool_),
        advantage=0.0,
        row_id=row_id,
    )


def offsets(rows: Sequence[TrainingRow]) -> dict[int, int]:
    """Where each row's tokens begin when all are laid end to end, by row id."""
    ends = np.cumsum([row.num_tokens for row in rows])
    return {row.row_id: int(end) - row.num_tokens for row, end in zip(rows, ends, strict=True)}


def normaliser_of(rows: Sequence[TrainingRow]) -> float:
    """Trained tokens of the batch."""
    return float(sum(len(row.response_ids) for row in rows))


def place_of_tokens(microbatch: Microbatch, starts: Mapping[int, int]) -> np.ndarray:
    """[T of the microbatch] int64, each token's place among those of all rows; -1 for a filler."""
    places = []
    for row_id, length in zip(microbatch.row_ids_R.tolist(), microbatch.cu_seqlens.diff().tolist(), strict=True):
        places.append(np.full(length, -1) if row_id == FILLER_ROW_ID else starts[row_id] + np.arange(length))
    return np.concatenate(places)


def add(recording: Recording, key: tuple[str, str], rows_L: torch.Tensor, values_LH: torch.Tensor) -> None:
    """Keep the real tokens' values. Recomputation passes a place twice; both are kept and compared."""
    real = rows_L >= 0
    recording.setdefault(key, []).append((rows_L[real], values_LH.detach().float().cpu()[real]))
