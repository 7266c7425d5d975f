"""Weights for a model whose loading is more than copies (sglang_trace.py says of what): whole tensors, which SGLang loads at the commit.

Takes two copies of the model beside SGLang's own, in the memory of the host.
"""

from collections.abc import Sequence

import torch

from tandem.engine.architecture import Architecture
from tandem.engine.buckets import BucketStream, Region
from tandem.engine.rollout.receive import WeightStore
from tandem.engine.types import BucketEntry, TensorMeta, WeightTransferError


class WholeTensors:
    """Meets the same commands as `ParameterStore`."""

    def __init__(self, model: torch.nn.Module, architecture: Architecture, dtype: torch.dtype) -> None:
        self._model = model
        self._store = WeightStore(architecture, dtype)
        self._knows_model = False  # whether every parameter of SGLang's is known to be among the tensors

    is_current = True
    must_settle = False

    def wanted(self) -> list[tuple[str, Region]] | None:
        """None: every tensor, whole."""
        return None

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        self._store.prepare(policy_version, tensors)

    def receive(self, stream: BucketStream | None, policy_version: int, swap: int, first_ticket: int) -> None:
        self._store.receive(stream, policy_version, swap, first_ticket)

    def load(self, path: str, entries: Sequence[BucketEntry]) -> None:
        self._store.load(path, entries)

    def commit(self) -> None:
        """Give the received version to SGLang. Raises: WeightTransferError if it is incomplete, or SGLang does not take it."""
        self._store.commit()
        try:
            self._give_to_model()
        except Exception as error:
            self.take_back()
            raise WeightTransferError(f"SGLang's model does not take the weights ({error}); it has the old ones again") from error

    def take_back(self) -> None:
        self._store.take_back()
        if self._store.serving is not None:
            self._give_to_model()

    def settle(self) -> None:
        """Nothing: the host keeps both copies."""

    def rollback(self) -> None:
        self._store.rollback()

    def digest(self) -> str | None:
        return None if self._store.serving is None else self._store.serving.digest()

    @torch.no_grad()
    def _give_to_model(self) -> None:
        serving = self._store.serving
        assert serving is not None
        if not self._knows_model:
            for parameter in self._model.parameters():
                parameter.fill_(torch.nan)
        # SGLang fuses and shards the tensors as it does those of a checkpoint on disk.
        self._model.load_weights(serving.named.items())  # pyright: ignore[reportCallIssue]
        if not self._knows_model:
            missing = [name for name, parameter in self._model.named_parameters() if parameter.isnan().any()]
            if missing and not any(tensor.isnan().any() for tensor in serving.named.values()):
                raise WeightTransferError(f"no tensor fills SGLang's parameter {missing[0]}")
            self._knows_model = True
