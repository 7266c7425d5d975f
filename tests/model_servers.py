"""`tandem serve` with a tiny random model, as a process of its own."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tandem.engine.data.tokenizer import byte_tokenizer
from tests.rollout.models import tiny_model

VOCAB_SIZE = 264  # 256 bytes, three special tokens, and what makes it a multiple of 8
EOS = 258
CONTEXT_LENGTH = 512


@dataclass(frozen=True)
class ModelServer:
    url: str  # with /v1
    model: PreTrainedModel  # as transformers has it
    process: "subprocess.Popen[str]"


def write_random_model(folder: Path, **changes: Any) -> PreTrainedModel:
    """A Hugging Face folder with the byte-level tokenizer, which reads and writes any text."""
    model = tiny_model(**{"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT_LENGTH, "eos_token_id": EOS, **changes})
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@contextlib.contextmanager
def model_server(folder: Path, *options: str, **changes: Any) -> Iterator[ModelServer]:
    """Its files go into the folder, whose name is the model's. Stopped with SIGTERM."""
    model = write_random_model(folder, **changes)
    with running_server(folder, *options) as (url, process):
        yield ModelServer(url, model, process)


@contextlib.contextmanager
def running_server(folder: Path, *options: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """`tandem serve` of a model folder: its URL with /v1, and its process."""
    words = [sys.executable, "-m", "tandem.engine.cli", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        found = re.search(r"is served at (http://127\.0\.0\.1:\d+/v1)", said)
        assert found, f"the server said {said!r} and ended with {process.wait(30)}"
        yield found.group(1), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()
