"""The embedded rollout engine's log-probs of what it generates."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tandem.engine.algo.pack import TrainingRow
from tandem.engine.checkpoint.hf_folder import read_hf_config
from tandem.engine.checkpoint.serve_folder import serve_folder
from tandem.engine.config import RepetitionConfig, RolloutConfig
from tandem.engine.parity.recording import FORWARD, LOGPROBS, Recording, add, offsets, training_row
from tandem.engine.rollout.embedded import EmbeddedEngine
from tandem.engine.trainer.layers import DTYPES
from tandem.engine.types import GenerationRequest


def record_rollout(model: Path, dtype: str, rows: Sequence[TrainingRow], seed: int) -> tuple[list[TrainingRow], Recording]:
    """What the embedded engine generates after the rows' prompts, as rows of their own, and its log-probs of that."""
    hf_config = read_hf_config(model)
    context_length = hf_config["max_position_embeddings"]
    requests = [
        GenerationRequest(
            request_id=str(row.row_id),
            token_ids=tuple(row.prompt_ids.tolist()),
            num_prefix_tokens=0,
            max_new_tokens=len(row.response_ids),
            seed=seed << 32 | row.row_id,
        )
        for row in rows
    ]
    config = RolloutConfig(
        max_response_tokens=max(len(row.response_ids) for row in rows), repetition=RepetitionConfig(max_period=0, ngram=0)
    )
    with EmbeddedEngine(hf_config, config, dtype=dtype, context_length=context_length, stop_token_ids=(), num_threads=1) as engine:
        serve_folder(model, engine, DTYPES[dtype])
        completions = {int(completion.request_id): completion for completion in engine.generate(requests)}
    generated = [training_row(row.prompt_ids, completions[row.row_id].token_ids, row_id=row.row_id) for row in rows]
    recording: Recording = {}
    starts = offsets(generated)
    for row in generated:
        prompt = torch.zeros(len(row.prompt_ids) - 1)
        values_T = torch.cat([prompt, torch.tensor(completions[row.row_id].logprobs)])
        add(recording, (FORWARD, LOGPROBS), starts[row.row_id] + torch.arange(row.num_tokens), values_T[:, None])
    return generated, recording
