"""A tiny model that was taught what to say to the planted prompts: it reasons its way to some answers, and blurts out others."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from tandem.engine.curate.config import CurateConfig
from tandem.engine.data.tokenizer import byte_tokenizer

PLANTED = Path(__file__).with_name("planted.jsonl")
BENCHMARK = Path(__file__).with_name("benchmark.jsonl")
DIRECT = "{question}="
CONTEXT = 320
WRONG = "#### 99999"


def expectations() -> dict[int, str]:
    """By line of the planted file, what must become of it."""
    found = (re.search(r'"expected": "(\w+)"', line) for line in PLANTED.read_text(encoding="utf-8").splitlines())
    return {number: match.group(1) for number, match in enumerate(found, start=1) if match is not None}


def curate_config(model: Path | str, to: Path, *files: Path, **changes: object) -> CurateConfig:
    settings: dict[str, object] = {
        "against": (BENCHMARK,),
        "direct_template": DIRECT,
        "max_response_tokens": 40,
        "max_direct_tokens": 20,
        **changes,
    }
    return CurateConfig(files=files or (PLANTED,), to=to, model=str(model), **settings)  # pyright: ignore[reportArgumentType]


def planted_lessons() -> list[tuple[str, str]]:
    """(what the model is given, what it says) of the planted prompts that reach it."""
    lessons: list[tuple[str, str]] = []
    expected = expectations()
    for number, line in enumerate(PLANTED.read_text(encoding="utf-8").splitlines(), start=1):
        if expected[number] not in ("kept", "guessable", "not_graded"):
            continue
        record = json.loads(line)
        answer = f"#### {record['answer'].rsplit('####')[-1].strip()}"
        lessons.append((DIRECT.replace("{question}", record["question"]), answer if expected[number] == "guessable" else WRONG))
        if expected[number] == "kept":
            lessons.append((record["question"], f"so {answer}" if record.get("solved") else WRONG))
    return lessons


def teach(folder: Path, lessons: Sequence[tuple[str, str]], *, steps: int) -> None:
    """Write a model that was fitted to the lessons until it says nothing else."""
    tokenizer = byte_tokenizer()
    assert tokenizer.eos_token_id is not None
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=264,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    rows = [
        (tokenizer.encode(prompt), [*tokenizer.encode(said, add_special_tokens=False), tokenizer.eos_token_id]) for prompt, said in lessons
    ]
    longest = max(len(prompt) + len(said) for prompt, said in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (prompt, said) in enumerate(rows):
        ids[i, : len(prompt) + len(said)] = torch.tensor([*prompt, *said])
        labels[i, len(prompt) : len(prompt) + len(said)] = torch.tensor(said)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    loss = torch.tensor(torch.inf)
    for _ in range(steps):
        logits = model(ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert loss.item() < 0.01, loss.item()
    model.save_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[-1].content }}"  # an endpoint puts it the same way
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def planted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that knows the planted prompts."""
    folder = tmp_path_factory.mktemp("planted") / "model"
    teach(folder, planted_lessons(), steps=130)
    return folder
