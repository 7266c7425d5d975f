"""A classic reward model: the policy's network with a score head, trained on preference pairs (Bradley-Terry).

The trainer, its layouts, checkpoints and optimizer are those of the policy; only the output layer and the loss differ.

Shapes: R responses, P pairs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from tandem.engine.algo.pack import Microbatch
from tandem.engine.architecture import SCORE_HEAD, TRANSFORMERS_TYPE
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.model import initialise
from tandem.engine.types import WeightShard

HEAD = "output_layer.weight"


def reward_model_config(hf_config: Mapping[str, Any], *, pad_token_id: int | None) -> dict[str, Any]:
    """config.json of the reward model on a language model's network, as transformers' …ForSequenceClassification with one label reads it.

    Args:
        pad_token_id: transformers scores the last token that is not this one, so it must never end a response. None: it then scores one
            sequence at a time.
    """
    kept = {name: value for name, value in hf_config.items() if name not in ("id2label", "label2id", "auto_map")}
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[TRANSFORMERS_TYPE[hf_config["model_type"]]]
    assert name.endswith(SCORE_HEAD)
    return kept | {"architectures": [name], "num_labels": 1, "tie_word_embeddings": False, "pad_token_id": pad_token_id}


class Network:
    """The weights of a reward model but for its head, as a language model has them: a `WeightSource` to load its folder into."""

    def __init__(self, trainer: MegatronTrainer, hf_config: Mapping[str, Any]) -> None:
        """
        Args:
            hf_config: config.json of the language model.
        """
        self._trainer, self.hf_config = trainer, hf_config

    def weight_shards(self) -> Iterable[WeightShard]:
        return [shard for shard in self._trainer.weight_shards() if shard.name != HEAD]

    def weights_changed(self) -> None:
        self._trainer.weights_changed()


def draw_head(trainer: MegatronTrainer, seed: int) -> None:
    """Random weights of the head, the same for every layout of the ranks."""
    initialise(trainer.chunks, trainer.mesh, seed, only=(HEAD,))
    trainer.weights_changed()


def preference_step(
    trainer: MegatronTrainer, microbatches: Sequence[Microbatch], margins: Sequence[torch.Tensor], num_pairs: int
) -> dict[str, float]:
    """One optimizer step on -log sigmoid(chosen - rejected - margin), the mean over the `num_pairs` pairs of all ranks. A collective.

    Args:
        microbatches: of whole pairs (`algo.preference.deal_pairs`).
        margins: [P] fp32 for each microbatch, by rising row id.
    Returns: loss in nats a pair; accuracy, the share of pairs whose chosen response scores higher; lead, by how much it does on average;
        grad_norm, learning_rate, pairs; the same on every rank. Of a step that was skipped, loss and grad_norm are NaN.
    """
    objectives = [losses.Preference(normaliser=float(num_pairs), margins_P=margins_P) for margins_P in margins]
    stepped = trainer.step(microbatches, objectives, "preference step")
    if stepped is None:
        return {"loss": math.nan, "grad_norm": math.nan, "pairs": 0.0}
    sums, grad_norm = stepped
    return {
        "loss": sums[losses.LOSS].item(),
        "grad_norm": grad_norm,
        "accuracy": sums[losses.RIGHT].item() / num_pairs,
        "lead": sums[losses.LEAD].item() / num_pairs,
        "pairs": sums[losses.PAIRS].item(),
    }


def scores(trainer: MegatronTrainer, microbatches: Sequence[Microbatch]) -> list[torch.Tensor]:
    """Scores of the responses of each microbatch by rising row id: [R] fp32, on every rank of the dp index. A collective."""
    values = trainer.logprobs(microbatches)
    return [losses.scores_of(microbatch, values_T.cpu()) for microbatch, values_T in zip(microbatches, values, strict=True)]
