"""The same batch in transformers' model: `python -m tandem.engine.parity.hf MODEL DTYPE ROWS OUT`.

A process of its own: the trainer's process runs Megatron's CPU shim, under which transformers leaves buffers unset that it makes while
loading weights.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tandem.engine.algo.pack import TrainingRow
from tandem.engine.checkpoint.safetensors_folder import open_safetensors
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
)


def run_hf(model: Path, dtype: str, rows: Sequence[TrainingRow]) -> Recording:
    """Record transformers' model in a process of its own. Raises: RuntimeError with what it printed if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "rows", Path(folder) / "recording"
        torch.save(list(rows), given)
        command = [sys.executable, "-m", "tandem.engine.parity.hf", str(model), dtype, str(given), str(made)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"transformers could not compute {model}:\n{ended.stderr[-3000:]}")
        return torch.load(made, weights_only=False)


def _record(model: Path, dtype: str, rows: Sequence[TrainingRow]) -> Recording:
    """Forward and backward of the cross entropy, a row at a time."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hf: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    hf.to(device)
    recording: Recording = {}
    starts, row_rows = offsets(rows), torch.zeros(0, dtype=torch.int64)

    def note(name: str, *, gradient: bool = False) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            values = out[0] if isinstance(out, tuple) else out
            values_LH = values.reshape(-1, values.shape[-1])
            add(recording, (FORWARD, name), row_rows, values_LH)
            if gradient:
                places = row_rows
                values.register_hook(lambda grad: add(recording, (BACKWARD, name), places, grad.reshape(-1, grad.shape[-1])))

        return hook

    hf.model.embed_tokens.register_forward_hook(note(EMBEDDING, gradient=True))
    hf.model.norm.register_forward_hook(note(FINAL_NORM, gradient=True))
    for index, layer in enumerate(hf.model.layers):
        layer.self_attn.register_forward_hook(note(layer_name(index, "attention")))
        layer.mlp.register_forward_hook(note(layer_name(index, "mlp")))
        layer.register_forward_hook(note(layer_name(index), gradient=True))
    for row in rows:
        row_rows = starts[row.row_id] + torch.arange(row.num_tokens)
        tokens = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64)).to(device)
        logits = hf(tokens[None, :-1], use_cache=False).logits[0, len(row.prompt_ids) - 1 :].float()
        logprobs_N = logits.log_softmax(-1).gather(1, tokens[len(row.prompt_ids) :, None])
        prompt = torch.zeros(len(row.prompt_ids) - 1, 1)
        add(recording, (FORWARD, LOGPROBS), row_rows, torch.cat([prompt, logprobs_N.detach().cpu()]))
        (-logprobs_N.double().sum() / normaliser_of(rows)).backward()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for parameter in hf.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
        hf.save_pretrained(folder)  # so that the gradients get the names that the weights have on disk
        with open_safetensors(Path(folder)) as reader:
            for name, shape in reader.shapes.items():
                region = tuple((0, size) for size in shape)
                recording[BACKWARD, name] = [(region, reader.read(name, region).float())]
    return recording


def main() -> None:
    model, dtype, given, made = sys.argv[1:]
    torch.save(_record(Path(model), dtype, torch.load(given, weights_only=False)), made)


if __name__ == "__main__":
    main()
