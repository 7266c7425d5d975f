"""The engine's two copies of the weights: one serves, the other receives the next version.

Query, key and value projections (and gate and up) lie one after another in one tensor, so that decoding multiplies once;
the tensors under their Hugging Face names are row ranges of those, so a swap needs no copy beyond the one that receives it.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from tandem.engine.rollout.architecture import Architecture
from tandem.engine.types import BucketEntry, TensorMeta, WeightTransferError

_MAX_MAPPINGS = 16  # of buckets; a sender has a few, and a restarted one brings new files


@dataclass(slots=True)
class LayerWeights:
    """One layer; E experts, F the width of the feed-forward layer or of an expert."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    q_norm: torch.Tensor  # [head_dim]
    k_norm: torch.Tensor  # [head_dim]
    o: torch.Tensor  # [hidden, heads * head_dim]
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2F, hidden], or [E, 2F, hidden] where the layer is sparse
    down: torch.Tensor  # [hidden, F], or [E, hidden, F]
    router: torch.Tensor | None  # [E, hidden] where the layer is sparse
    qk_norm: torch.Tensor  # [heads + kv_heads, head_dim]: q_norm and k_norm for every head, made by `finish`


class ModelWeights:
    """One version of all weights. `named` maps Hugging Face names to contiguous views of the fused tensors."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        a = architecture
        self.architecture = a
        self.dtype = dtype
        self.policy_version = -1
        self.named: dict[str, torch.Tensor] = {}
        self.embedding = self._tensor("model.embed_tokens.weight", a.vocab_size, a.hidden_size)
        self.layers = [self._layer(index) for index in range(a.num_layers)]
        self.norm = self._tensor("model.norm.weight", a.hidden_size)
        self.head = self.embedding if a.tie_word_embeddings else self._tensor("lm_head.weight", a.vocab_size, a.hidden_size)
        self.bytes = {name: tensor.view(-1).view(torch.uint8).numpy().data for name, tensor in self.named.items()}
        # Logits are computed in float32: rounding them to bfloat16 alone would move log-probs by up to 0.03.
        self.head_fp32 = self.head if dtype == torch.float32 else torch.zeros(a.vocab_size, a.hidden_size)

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        self.named[name] = torch.zeros(shape, dtype=self.dtype)
        return self.named[name]

    def _rows(self, tensor: torch.Tensor, names_and_rows: Sequence[tuple[str, int]]) -> None:
        parts = tensor.split([rows for _, rows in names_and_rows])
        self.named.update({name: part for (name, _), part in zip(names_and_rows, parts, strict=True)})

    def _layer(self, index: int) -> LayerWeights:
        a = self.architecture
        name = f"model.layers.{index}"
        q_rows, kv_rows = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        qkv = torch.zeros(q_rows + 2 * kv_rows, a.hidden_size, dtype=self.dtype)
        attention = f"{name}.self_attn"
        self._rows(qkv, [(f"{attention}.{p}_proj.weight", rows) for p, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))])
        router = None
        if a.sparse_layers[index]:
            width = a.moe_intermediate_size
            router = self._tensor(f"{name}.mlp.gate.weight", a.num_experts, a.hidden_size)
            gate_up = torch.zeros(a.num_experts, 2 * width, a.hidden_size, dtype=self.dtype)
            down = torch.zeros(a.num_experts, a.hidden_size, width, dtype=self.dtype)
            for e in range(a.num_experts):
                block = f"{name}.mlp.experts.{e}"
                self._rows(gate_up[e], [(f"{block}.gate_proj.weight", width), (f"{block}.up_proj.weight", width)])
                self.named[f"{block}.down_proj.weight"] = down[e]
        else:
            width = a.intermediate_size
            gate_up = torch.zeros(2 * width, a.hidden_size, dtype=self.dtype)
            self._rows(gate_up, [(f"{name}.mlp.gate_proj.weight", width), (f"{name}.mlp.up_proj.weight", width)])
            down = self._tensor(f"{name}.mlp.down_proj.weight", a.hidden_size, width)
        return LayerWeights(
            input_norm=self._tensor(f"{name}.input_layernorm.weight", a.hidden_size),
            qkv=qkv,
            q_norm=self._tensor(f"{attention}.q_norm.weight", a.head_dim),
            k_norm=self._tensor(f"{attention}.k_norm.weight", a.head_dim),
            o=self._tensor(f"{attention}.o_proj.weight", a.hidden_size, q_rows),
            post_norm=self._tensor(f"{name}.post_attention_layernorm.weight", a.hidden_size),
            gate_up=gate_up,
            down=down,
            router=router,
            qk_norm=torch.zeros(a.num_heads + a.num_kv_heads, a.head_dim, dtype=self.dtype),
        )

    def finish(self) -> None:
        """Compute what is derived from the received tensors."""
        a = self.architecture
        for layer in self.layers:
            layer.qk_norm[: a.num_heads] = layer.q_norm
            layer.qk_norm[a.num_heads :] = layer.k_norm
        if self.head_fp32 is not self.head:
            self.head_fp32.copy_(self.head)


class WeightStore:
    """Receives versions in transactions (the child's side of `WeightSink`).

    `commit` exchanges the serving and the receiving copy: nothing is allocated after the second swap.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        self.architecture = architecture
        self.dtype = dtype
        self.serving: ModelWeights | None = None
        self._spare: ModelWeights | None = None
        self._receiving: ModelWeights | None = None
        self._received: dict[str, list[tuple[int, int]]] = {}  # name: byte ranges [start, end)
        self._failed = False
        self._buckets = _Mappings()

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        """Begin a transaction. Raises: WeightTransferError naming the tensor that is not the model's."""
        self.rollback()
        _check_tensors(self.architecture.tensor_shapes(), self.dtype, tensors)
        self._receiving = self._spare or ModelWeights(self.architecture, self.dtype)
        self._spare = None
        self._receiving.policy_version = policy_version
        self._received = {name: [] for name in self._receiving.named}
        self._failed = False

    def load(self, path: str, entries: Sequence[BucketEntry]) -> None:
        """Copy one bucket straight into place and verify what arrived, entry by entry while it is in the cache."""
        if self._receiving is None:
            raise WeightTransferError(f"bucket {path} came outside a transaction; call prepare first")
        self._failed = True  # until every checksum held
        try:
            bucket = self._buckets.open(path)
        except OSError as error:
            raise WeightTransferError(f"bucket {path} cannot be opened: {error}") from error
        for entry in entries:
            self._load_entry(path, bucket, self._receiving, entry)
        self._failed = False

    def _load_entry(self, path: str, bucket: memoryview, receiving: ModelWeights, entry: BucketEntry) -> None:
        end = entry.tensor_start + entry.num_bytes
        tensor = receiving.bytes.get(entry.name)
        if tensor is None:
            raise WeightTransferError(f"bucket {path}: tensor {entry.name} is not one of the model")
        if entry.tensor_start < 0 or end > tensor.nbytes:
            raise WeightTransferError(f"bucket {path}: bytes {entry.tensor_start}:{end} of tensor {entry.name}, which has {tensor.nbytes}")
        if entry.num_bytes == 0:
            return
        source = bucket[entry.bucket_start : entry.bucket_start + entry.num_bytes]
        if len(source) < entry.num_bytes:
            raise WeightTransferError(f"bucket {path} ends within tensor {entry.name}: {len(source)} of {entry.num_bytes} bytes")
        target = tensor[entry.tensor_start : end]
        target[:] = source  # libc's copy: half the time of torch's and of preadv
        checksum = xxhash.xxh3_64_intdigest(target)
        if checksum != entry.checksum:
            raise WeightTransferError(
                f"bucket {path}: tensor {entry.name}, bytes {entry.tensor_start}:{end}: "
                f"checksum {checksum:016x} arrived, {entry.checksum:016x} was sent"
            )
        self._received[entry.name].append((entry.tensor_start, end))

    def commit(self) -> int:
        """Flip. Returns the new policy version. Raises: WeightTransferError naming the first incomplete tensor."""
        if self._receiving is None:
            raise WeightTransferError("commit outside a transaction; call prepare first")
        if self._failed:
            raise WeightTransferError("commit after a bucket that failed; roll back")
        for name, tensor in self._receiving.named.items():
            covered = 0
            for start, end in sorted(self._received[name]):
                if start > covered:
                    break
                covered = max(covered, end)
            if covered < tensor.nbytes:
                raise WeightTransferError(f"tensor {name} is incomplete: byte {covered} of {tensor.nbytes} never came")
        self._receiving.finish()
        self._spare, self.serving, self._receiving = self.serving, self._receiving, None
        return self.serving.policy_version

    def rollback(self) -> None:
        """Forget the transaction, if there is one."""
        if self._receiving is not None:
            self._spare, self._receiving = self._receiving, None


class _Mappings:
    """Buckets stay mapped between loads: filling page tables takes longer than copying."""

    def __init__(self) -> None:
        self._mapped: dict[str, tuple[tuple[int, ...], memoryview]] = {}

    def open(self, path: str) -> memoryview:
        """The file's present content. Raises: OSError if it cannot be opened."""
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino, status.st_size)
        known, memory = self._mapped.get(path, (None, memoryview(b"")))
        if known != identity:
            memory = self._map(path)
            self._mapped.pop(path, None)
            if len(self._mapped) == _MAX_MAPPINGS:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[path] = identity, memory
        return memory

    def _map(self, path: str) -> memoryview:
        file = os.open(path, os.O_RDONLY)
        try:
            if not (size := os.fstat(file).st_size):
                return memoryview(b"")
            return memoryview(mmap.mmap(file, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ))
        finally:
            os.close(file)


def _check_tensors(expected: dict[str, tuple[int, ...]], dtype: torch.dtype, tensors: Sequence[TensorMeta]) -> None:
    got = {tensor.name for tensor in tensors}
    missing = [name for name in expected if name not in got]
    if missing:
        raise WeightTransferError(f"{len(missing)} tensors of the model are missing, the first is {missing[0]}")
    for tensor in tensors:
        shape = expected.get(tensor.name)
        if shape is None:
            raise WeightTransferError(f"tensor {tensor.name} is not one of the model")
        if tuple(tensor.shape) != shape:
            raise WeightTransferError(f"tensor {tensor.name} has shape {list(tensor.shape)}; the model has {list(shape)}")
        if tensor.dtype != dtype:
            raise WeightTransferError(f"tensor {tensor.name} is {tensor.dtype}; the model is {dtype}")
