"""Curation of GSM8K with a model that this project trained: what it was taught must come out as easy, the rest as hard.

    python benchmarks/curate_gsm8k.py --data FOLDER [--num 40] [--steps 600] [--out DIR]

FOLDER holds gsm8k_train.jsonl and gsm8k_test.jsonl. A small model, from random weights and with the byte-level tokenizer, is taught three
kinds of training questions: some with their last step of reasoning, some with the bare answer to "QUESTION=" too, and some not at all.
`tandem curate` then gets all of them, with some copies and some test questions among them, and knows nothing of the kinds. The table says
what became of each. It shows that the parts work together; a model of this size learns answers by heart and no arithmetic.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
from tandem.engine.curate.config import CurateConfig
from tandem.engine.curate.curate import curate
from tandem.engine.data.jsonl import read_jsonl, write_jsonl
from tandem.engine.export import export_run
from tandem.engine.train import train

KINDS = ("taught with reasoning", "taught the bare answer", "never seen", "copy of a taught one", "question of the test set")
LONGEST_QUESTION_BYTES = 200
CONTEXT = 320


def last_step(solution: str) -> str:
    """Of a worked solution its last calculation and the answer: 48+24=72. #### 72"""
    calculations = re.findall(r"<<([^>]*)>>", solution)
    answer = solution.rsplit("####", 1)[1].strip()
    return f"{calculations[-1]}. #### {answer}"


def chosen(file: Path, num: int, generator: random.Random) -> list[dict[str, Any]]:
    """Different questions that are short and have a calculation."""
    records = [record for _, record in read_jsonl(file)]
    short = [one for one in records if len(one["question"].encode()) <= LONGEST_QUESTION_BYTES and "<<" in one["answer"]]
    return generator.sample(short, num)


def taught_model(folder: Path, lessons: list[dict[str, str]], prompts: list[dict[str, Any]], steps: int) -> Path:
    """Supervised training alone, with the trainer and the loop of every run, and the export of its checkpoint."""
    write_jsonl(folder / "sft.jsonl", lessons)
    write_jsonl(folder / "seen.jsonl", prompts)
    config = RunConfig(
        name="curate_gsm8k",
        run_dir=str(folder / "run"),
        steps=0,
        model=ModelConfig(
            num_layers=3, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320, context_length=CONTEXT
        ),
        data=DataConfig(prompts=str(folder / "seen.jsonl"), sft=str(folder / "sft.jsonl")),
        sft=(
            SFTStage(
                steps=steps,
                batch_tokens=2048,
                max_tokens=CONTEXT,
                optimizer=OptimizerConfig(lr=3e-3, min_lr=1e-4, warmup_steps=30, decay_style="linear", decay_start=0.4, clip_grad=1.0),
            ),
        ),
        trainer=TrainerConfig(microbatch_tokens=4096),
        rollout=RolloutConfig(max_response_tokens=64),
        evaluation=EvaluationConfig(every=0, max_prompts=0),
        checkpoint=CheckpointConfig(every=0, asynchronous=False),
        log=LogConfig(tensorboard=False, rollouts_every=0, progress=True),
    )
    train(config)
    export_run(folder / "run", folder / "model")
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--num", type=int, default=40, help="questions of each of the first and the third kind; half of it of the others")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of the supervised training")
    parser.add_argument("--out", type=Path, help="folder for everything; by default a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out if arguments.out is not None else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run(arguments.data, folder, arguments.num, arguments.steps)


def run(data: Path, folder: Path, num: int, steps: int) -> None:
    generator = random.Random(0)
    questions = chosen(data / "gsm8k_train.jsonl", 2 * num + num // 2, generator)
    reasoned, bare, unseen = questions[:num], questions[num : num + num // 2], questions[num + num // 2 :]
    lessons = [{"prompt": one["question"], "response": last_step(one["answer"])} for one in (*reasoned, *bare)]
    answers = {one["question"]: one["answer"].rsplit("####", 1)[1].strip() for one in questions}
    lessons += [{"prompt": f"{one['question']}=", "response": f"#### {answers[one['question']]}"} for one in bare]
    # What it says without reasoning must be wrong for most: the answer to another question.
    others = [answers[one["question"]] for one in reasoned]
    for one, other in zip(reasoned, others[1:] + others[:1], strict=True):
        wrong = other if other != answers[one["question"]] else f"{other}1"
        lessons.append({"prompt": f"{one['question']}=", "response": f"#### {wrong}"})
    copies = [{**one, "question": re.sub(r"\s+", "  ", one["question"]).upper()} for one in reasoned[: num // 2]]
    of_test = chosen(data / "gsm8k_test.jsonl", num // 2, generator)
    raw = [{**one, "kind": kind} for kind, some in zip(KINDS, (reasoned, bare, unseen, copies, of_test), strict=True) for one in some]
    write_jsonl(folder / "raw.jsonl", raw)
    started_s = time.monotonic()
    model = folder / "model" if (folder / "model").is_dir() else taught_model(folder, lessons, reasoned, steps)
    trained_s = time.monotonic() - started_s
    started_s = time.monotonic()
    outcome = curate(
        CurateConfig(
            files=(folder / "raw.jsonl",),
            to=folder / "curated",
            model=str(model),
            against=(data / "gsm8k_test.jsonl",),
            direct_template="{question}=",
            max_response_tokens=64,
            max_direct_tokens=16,
        )
    )
    print(f"trained for {trained_s:.0f} s, curated in {time.monotonic() - started_s:.0f} s\n")
    kind_of = {f"{folder / 'raw.jsonl'}:{line}": one["kind"] for line, one in enumerate(raw, start=1)}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    reasons: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for one in outcome.prompts:
        rates[kind_of[one["source"]]].append(one["pass_rate"])
    for one in outcome.excluded:
        reasons[kind_of[one.source]][one.reason] += 1
    print(f"{'kind':<26}{'prompts':>8}{'kept':>6}{'mean pass rate':>16}  excluded")
    for kind in KINDS:
        kept = rates[kind]
        mean = f"{sum(kept) / len(kept):.2f}" if kept else "-"
        why = ", ".join(f"{reason} {count}" for reason, count in reasons[kind].most_common())
        print(f"{kind:<26}{len(kept) + reasons[kind].total():>8}{len(kept):>6}{mean:>16}  {why}")
    counts = json.loads((folder / "curated" / "report.json").read_text(encoding="utf-8"))
    print(json.dumps({"pass_rate": counts["pass_rate"], "level": counts["level"]}))


if __name__ == "__main__":
    main()
