"""A Hugging Face folder straight into a rollout engine, without a trainer: for evaluation."""

import mmap
import os
from pathlib import Path

import torch
import xxhash

from tandem.engine.checkpoint.hf_folder import read_hf_config
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.checkpoint.safetensors_folder import open_safetensors
from tandem.engine.types import BucketEntry, WeightSink


def serve_folder(folder: Path, sink: WeightSink, dtype: torch.dtype, *, policy_version: int = 0, bucket_bytes: int = 64 << 20) -> None:
    """Stream the folder's tensors through one bucket of memory without a name, and commit them.

    Raises: ValueError if the folder is no model or its tensors are not the model's; WeightTransferError from the engine.
    """
    hf_config = read_hf_config(folder)
    tensors = NameMap(hf_config).tensors(dtype)
    tied = ("lm_head.weight",) if hf_config.get("tie_word_embeddings") else ()
    descriptor = os.memfd_create("tandem_serve_folder", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, bucket_bytes)
        with mmap.mmap(descriptor, bucket_bytes) as bucket, open_safetensors(folder) as reader:
            reader.check(tensors, ignored=tied)
            sink.prepare(policy_version, tensors)
            for meta in tensors:
                whole = reader.read(meta.name, tuple((0, size) for size in meta.shape)).to(meta.dtype).contiguous()
                data = whole.view(-1).view(torch.uint8).numpy().data
                for start in range(0, meta.num_bytes, bucket_bytes):
                    part = data[start : start + bucket_bytes]
                    bucket[: len(part)] = part
                    entry = BucketEntry(
                        name=meta.name, tensor_start=start, num_bytes=len(part), bucket_start=0, checksum=xxhash.xxh3_64_intdigest(part)
                    )
                    sink.load(f"/proc/{os.getpid()}/fd/{descriptor}", [entry])
            sink.commit()
            sink.settle()
    finally:
        os.close(descriptor)
