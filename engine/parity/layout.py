"""A trainer's layout, recorded by hooks on its layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tandem.engine.algo.pack import TrainingRow, build_microbatch
from tandem.engine.checkpoint.hf_folder import load_hf_weights, read_hf_config
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.parity.recording import (
    BACKWARD,
    EMBEDDING,
    FINAL_NORM,
    FORWARD,
    LOGPROBS,
    Recording,
    add,
    layer_name,
    normaliser_of,
    offsets,
    place_of_tokens,
)
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.batch import LocalBatch
from tandem.engine.trainer.context_parallel import split_tokens
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh, destroy_mesh
from tandem.engine.trainer.model import named_weights
from tandem.engine.types import WeightShard

# A few rows each, so that there are several microbatches.
ROWS_PER_MICROBATCH = 2


class _Recorder:
    """Hooks on the chunks of a trainer."""

    def __init__(self, trainer: MegatronTrainer, starts: Mapping[int, int]) -> None:
        self.recording: Recording = {}
        self._mesh, self._starts = trainer.mesh, starts
        self._batch: LocalBatch | None = None
        for chunk in trainer.chunks:
            decoder: Any = chunk.decoder
            decoder.register_forward_pre_hook(self._on_decoder_input, with_kwargs=True)
            decoder.register_forward_hook(self._on_decoder_output)
            for layer in decoder.layers:
                index = layer.layer_number - 1
                layer.register_forward_pre_hook(self._on_layer, with_kwargs=True)
                layer.self_attention.register_forward_hook(self._note(layer_name(index, "attention")))
                layer.mlp.register_forward_hook(self._note(layer_name(index, "mlp")))
                layer.register_forward_hook(self._note(layer_name(index), gradient=True))

    def _on_layer(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._batch = kwargs["packed_seq_params"]

    def _on_decoder_input(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._batch = kwargs["packed_seq_params"]
        if decoder.pre_process:
            self._record(EMBEDDING, kwargs["hidden_states"], gradient=True)

    def _on_decoder_output(self, decoder: Any, args: Any, out: torch.Tensor) -> None:
        if decoder.post_process:
            self._record(FINAL_NORM, out, gradient=True)

    def _note(self, name: str, *, gradient: bool = False) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            self._record(name, out[0] if isinstance(out, tuple) else out, gradient=gradient)

        return hook

    def _record(self, name: str, values_L1H: torch.Tensor, *, gradient: bool) -> None:
        assert self._batch is not None
        rows_L = self._rows(self._batch)
        add(self.recording, (FORWARD, name), rows_L, values_L1H[:, 0])
        if gradient and values_L1H.requires_grad:
            values_L1H.register_hook(lambda grad_L1H: add(self.recording, (BACKWARD, name), rows_L, grad_L1H[:, 0]))

    def _rows(self, batch: LocalBatch) -> torch.Tensor:
        """[L] int64 the place of each token of this rank, -1 for padding and fillers."""
        mesh = self._mesh
        cu_seqlens = batch.whole.cu_seqlens.cpu().numpy().astype(np.int64)
        own_L = split_tokens(cu_seqlens, mesh.cp_size, mesh.token_multiple, batch.num_local)[mesh.cp_rank]
        place_T = np.append(place_of_tokens(batch.whole, self._starts), -1)  # -1, padding, looks at the last
        place_L = torch.from_numpy(place_T[own_L])
        return place_L.chunk(mesh.tp_size)[mesh.tp_rank] if mesh.config.sequence_parallel else place_L


def record_layout(
    model: Path,
    mesh_config: MeshConfig,
    trainer_config: TrainerConfig,
    rows: Sequence[TrainingRow],
    tamper: Callable[[MegatronTrainer], None] | None = None,
) -> Recording:
    """This rank's part of one forward and backward pass of the cross entropy of `rows`. A collective of all ranks of the layout.

    Args:
        tamper: called with the loaded trainer; a test's way to do damage.
    """
    hf_config = read_hf_config(model)
    mesh = build_mesh(mesh_config, hf_config)
    try:
        trainer = MegatronTrainer(hf_config, mesh, trainer_config, loss=LossConfig(), temperature=1.0, seed=None)
        load_hf_weights(model, trainer)
        if tamper is not None:
            tamper(trainer)
        starts, own = offsets(rows), rows[mesh.dp_rank :: mesh.dp_size]
        microbatches = [build_microbatch(own[i : i + ROWS_PER_MICROBATCH]) for i in range(0, len(own), ROWS_PER_MICROBATCH)]
        logprobs = trainer.logprobs(microbatches)
        recorder = _Recorder(trainer, starts)
        objective = losses.Supervised(normaliser=normaliser_of(rows))
        trainer.accumulate_gradients(microbatches, [objective] * len(microbatches))
        recording = recorder.recording
        for microbatch, logprobs_T in zip(microbatches, logprobs, strict=True):
            place_T = torch.from_numpy(place_of_tokens(microbatch, starts))
            add(recording, (FORWARD, LOGPROBS), place_T, logprobs_T[:, None])
        names = NameMap(hf_config)
        for shard in _gradients(trainer):
            for view in names.views(shard):
                values = torch.empty(view.region_shape)
                view.copy_to(values)
                recording.setdefault((BACKWARD, view.name), []).append((view.region, values))
        return recording
    finally:
        destroy_mesh()


def _gradients(trainer: MegatronTrainer) -> Iterator[WeightShard]:
    mesh = trainer.mesh
    for chunk in trainer.chunks:
        for name, parameter in named_weights(chunk, mesh):
            is_expert = "local_experts" in name
            gradient: Any = parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]
            yield WeightShard(
                name=name,
                tensor=gradient.float().cpu(),
                tp_rank=mesh.etp_rank if is_expert else mesh.tp_rank,
                tp_size=mesh.etp_size if is_expert else mesh.tp_size,
            )
