"""Records tests/reward/exchanges/testgen.json: what `tandem testgen` asks a model that we trained, and what that answers.

    python tests/reward/record_exchange.py [--to FILE] [--steps 150]

A small model, from random weights, is taught by the trainer to write CYaRon generators for a handful of problems: some minutes on two
cores. `tandem serve` offers its export over HTTP, and the testgen command asks it through a server that passes everything on and writes
it down. The file holds the problems, the settings, the exchanges, and the tests that came of them; `test_testgen.py` replays it. A model
of this size knows its lessons by heart and nothing else: what is recorded are real requests to a real server and real replies, not a
capable model. One lesson begins with a generator that does not run, so that the record holds a second question too.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tandem.engine.chat_api import ChatRequest
from tandem.engine.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SFTStage,
    TrainerConfig,
)
from tandem.engine.data.jsonl import write_jsonl
from tandem.engine.data.tokenizer import EOS, HFTokenizer, load_tokenizer
from tandem.engine.export import export_run
from tandem.engine.reward.chat import Endpoint, Message, Reply
from tandem.engine.reward.sandbox import Sandbox
from tandem.engine.reward.testgen import Settings, make_tests
from tandem.engine.testgen import generate_tests, read_problems
from tandem.engine.train import train
from tests.model_servers import running_server
from tests.reward.chat_endpoint import EXCHANGES, Answer, Script, chat_server
from tests.reward.made_tests import made_tests
from tests.rollout.models import tiny_model

SETTINGS = Settings(num_tests=12, min_valid=10)
VOCAB_SIZE, CONTEXT, REPLY_TOKENS = 768, 2048, 512
STEPS = 150  # the lessons are known by heart after some 80

MAXIMUM = "n = int(input())\nprint(max(map(int, input().split())))"
LAST = "n = int(input())\nprint(input().split()[-1])"
SUM = "a, b = map(int, input().split())\nprint(a + b)"
REVERSED = "print(input()[::-1])"
EDGES = "n = int(input())\ndegree = [0] * (n + 1)\nfor _ in range(n - 1):\n    for v in map(int, input().split()):\n"
LEAVES = EDGES + "        degree[v] += 1\nprint(degree.count(1))"

# Nine right programs and a wrong one, twice; the others are lessons only.
PROBLEMS: list[dict[str, Any]] = [
    {
        "id": "largest",
        "question": "You are given n (1 <= n <= 100) and n integers between 1 and 1000. Print the largest of them.",
        "submissions": [MAXIMUM] * 9 + [LAST],
    },
    {
        "id": "leaves",
        "question": "A tree has n vertices (2 <= n <= 100); n - 1 lines give its edges. Print how many vertices have one edge only.",
        "submissions": [LEAVES] * 9 + ["print(2)"],
    },
    {"id": "sum", "question": "Two integers between 1 and 1000000 are on one line. Print their sum.", "submissions": [SUM] * 10},
    {
        "id": "backwards",
        "question": "A word of at most 50 small letters is given. Print it backwards.",
        "submissions": [REVERSED] * 10,
    },
]
NUM_ASKED = 2


def _fenced(*lines: str) -> str:
    program = "\n".join(("from cyaron import *", "", "def generate(io, number):", *lines))
    return f"```python\n{program}\n```"


_LARGEST = ("    n = min(100, number * number)", "    io.input_writeln(n)", "    io.input_writeln([randint(1, 1000) for _ in range(n)])")
# Of each problem, the replies to the first and, where there is one, to the second question.
LESSONS: dict[str, tuple[str, ...]] = {
    "largest": (_fenced(*_LARGEST).replace("number):", "number)"), _fenced(*_LARGEST)),
    "leaves": (
        _fenced(
            "    n = min(100, number + 1)",
            "    io.input_writeln(n)",
            "    make = Graph.chain if number % 3 == 0 else Graph.tree",
            "    io.input_writeln(make(n).to_str(output=Edge.unweighted_edge))",
        ),
    ),
    "sum": (_fenced("    io.input_writeln(randint(1, 10 ** min(6, number)), randint(1, 1000000))"),),
    "backwards": (_fenced('    io.input_writeln(String.random(min(50, 4 * number), charset="abcdefghijklmnopqrstuvwxyz"))'),),
}


def lessons(problems: Path) -> list[tuple[list[Message], str]]:
    """Conversations up to a reply, and the reply: the questions are those that the command asks, complaints of the sandbox included."""
    found: list[tuple[list[Message], str]] = []
    with Sandbox(num_workers=1) as sandbox:
        for problem in read_problems(problems):
            replies = iter(LESSONS[problem.id])

            def teach(messages: Sequence[Message], replies: Any = replies) -> Reply:
                found.append((list(messages), next(replies)))
                return Reply(text=found[-1][1], is_complete=True)

            outcome = make_tests(problem, teach, sandbox, SETTINGS)
            assert len(outcome.tests) == SETTINGS.num_tests, (problem.id, outcome)
    return found


def write_random_model(folder: Path, texts: Sequence[str]) -> HFTokenizer:
    """A Hugging Face folder with a tokenizer of its own: byte-level BPE trained on the lessons, which makes their prompts short."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[EOS], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32, "initializer_range": 0.02}
    sizes |= {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT, "eos_token_id": tokenizer.eos_token_id}
    tiny_model(**sizes).save_pretrained(folder)
    return tokenizer


def taught_model(folder: Path, problems: Path, steps: int) -> Path:
    """Trained by the loop of every run, and exported."""
    taught = lessons(problems)
    random = folder / "random"
    tokenizer = write_random_model(random, ["\n".join(message["content"] for message in messages) + reply for messages, reply in taught])
    examples = []
    for messages, reply in taught:
        [prompt_ids] = ChatRequest.model_validate({"model": "", "messages": messages}).prompts(tokenizer)  # as the server writes it
        examples.append({"prompt": tokenizer.decode(prompt_ids, skip_special_tokens=True), "response": reply})
    write_jsonl(folder / "sft.jsonl", examples)
    write_jsonl(folder / "prompts.jsonl", [{"question": "1 + 1", "answer": "2"}])  # a run wants some; no step of it uses them
    config = RunConfig(
        name="record_exchange",
        run_dir=str(folder / "run"),
        steps=0,
        model=ModelConfig(path=str(random), context_length=CONTEXT),
        data=DataConfig(prompts=str(folder / "prompts.jsonl"), sft=str(folder / "sft.jsonl")),
        sft=(
            SFTStage(
                steps=steps,
                batch_tokens=4096,
                max_tokens=CONTEXT,
                optimizer=OptimizerConfig(lr=2e-3, min_lr=1e-4, warmup_steps=20, decay_style="linear", decay_start=0.5, clip_grad=1.0),
            ),
        ),
        trainer=TrainerConfig(microbatch_tokens=4096),
        rollout=RolloutConfig(max_response_tokens=64),
        evaluation=EvaluationConfig(every=0, max_prompts=0),
        checkpoint=CheckpointConfig(every=0, asynchronous=False),
        log=LogConfig(tensorboard=False, rollouts_every=0),
    )
    train(config)
    export_run(folder / "run", folder / "model")
    return folder / "model"


def passing_on(url: str, exchanges: list[dict[str, Any]]) -> Script:
    """Answers as the server at `url` does, and writes down what was asked and answered."""

    def script(body: dict[str, Any], number: int) -> Answer:
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=600)
        exchanges.append({"request": body, "response": {"status": answer.status_code, "body": answer.json()}})
        return Answer(body=answer.json(), status=answer.status_code)

    return script


def record(folder: Path, steps: int) -> dict[str, Any]:
    """Train, serve, ask: the whole record."""
    write_jsonl(folder / "lessons.jsonl", PROBLEMS)
    write_jsonl(folder / "problems.jsonl", PROBLEMS[:NUM_ASKED])
    model = taught_model(folder, folder / "lessons.jsonl", steps)
    exchanges: list[dict[str, Any]] = []
    with running_server(model) as (url, _), chat_server(passing_on(url, exchanges), models=(model.name,)) as between:
        endpoint = Endpoint(url=between.url, max_tokens=REPLY_TOKENS)
        counts = generate_tests(folder / "problems.jsonl", folder / "out", endpoint, SETTINGS, num_workers=1)
    return {
        "origin": "recorded by tests/reward/record_exchange.py from `tandem serve` with a model that the script trains",
        "problems": PROBLEMS[:NUM_ASKED],
        "settings": asdict(SETTINGS),
        "max_tokens": REPLY_TOKENS,
        "exchanges": sorted(exchanges, key=lambda one: json.dumps(one["request"])),  # two problems are asked at a time
        "counts": counts,
        "tests": made_tests(folder / "out"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=EXCHANGES / "testgen.json")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder), arguments.steps)
    assert set(found["tests"]) == {problem["id"] for problem in found["problems"]}, found["counts"]
    arguments.to.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {arguments.to}: {len(found['exchanges'])} exchanges, {found['counts']}")


if __name__ == "__main__":
    main()
