"""SGLang loads this through its entry point `sglang.srt.plugins` in every process of a server on a CPU: no calls to CUDA remain."""

from typing import Any

import tandem_sglang_arithmetic as arithmetic  # pyright: ignore[reportMissingImports]
import torch
from tandem_sglang_attention import batched_decode, batched_extend  # pyright: ignore[reportMissingImports]


def load() -> None:
    """Replace what a CPU does not have, and allow seeded sampling with the only attention backend that runs on any CPU."""
    try:
        import sglang.srt.arg_groups.choices as choices  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:  # where 0.5.17 has them
        import sglang.srt.server_args as choices  # pyright: ignore[reportMissingImports]
    import sglang.srt.layers.quantization.unquant as unquantized  # pyright: ignore[reportMissingImports]
    import sglang.srt.layers.rotary_embedding.base as rotary  # pyright: ignore[reportMissingImports]
    import sglang.srt.layers.rotary_embedding.mrope as multimodal_rotary  # pyright: ignore[reportMissingImports]
    import sglang.srt.mem_cache.pool_host.common as pinned_memory  # pyright: ignore[reportMissingImports]
    import sglang.srt.state_capturer.base as capturer  # pyright: ignore[reportMissingImports]
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # pyright: ignore[reportMissingImports]
    from sglang.srt.layers.logits_processor import LogitsProcessor  # pyright: ignore[reportMissingImports]
    from sglang.srt.model_executor.model_runner import ModelRunner  # pyright: ignore[reportMissingImports]

    # Host buffers, of routed experts for one, are pinned for copies from a GPU.
    pinned_memory._cuda_host_register = nothing
    pinned_memory._cuda_host_unregister = nothing
    capturer._cuda_host_unregister = nothing
    torch.cuda.synchronize = nothing
    # --enable-deterministic-inference is what makes SGLang heed a request's seed; the rest of it is about Triton kernels.
    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])  # and the prefix cache, which it would turn off
    ModelRunner.maybe_enable_batch_invariant_mode = nothing
    # A loop over the rows in Python took half of the time of a decode step.
    TorchNativeAttnBackend._run_sdpa_forward_decode = batched_decode(TorchNativeAttnBackend._run_sdpa_forward_decode)
    TorchNativeAttnBackend._run_sdpa_forward_extend = batched_extend(TorchNativeAttnBackend._run_sdpa_forward_extend)
    # And what else is rounded in another way than in the trainer.
    unquantized.F = arithmetic.functional
    LogitsProcessor._compute_lm_head = arithmetic.head(LogitsProcessor._compute_lm_head)
    rotary.apply_rotary_emb = multimodal_rotary.apply_rotary_emb = arithmetic.rotate


def nothing(*_: Any, **__: Any) -> None:
    """Instead of a call to CUDA."""
