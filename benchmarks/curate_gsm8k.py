"""Curation of GSM8K with a model that this project trained: the more often it was taught a question, the easier that must come out.

    python benchmarks/curate_gsm8k.py --data FOLDER [--num 24] [--steps 500] [--out DIR]

FOLDER holds gsm8k_train.jsonl and gsm8k_test.jsonl. A small model, from random weights and with the byte-level tokenizer, is taught
questions of the training set with their last step of reasoning: some once an epoch, some twice, and so on up to sixteen times; some with
the bare answer to "QUESTION=" too; and some not at all. `tandem curate` then gets all of them, with some copies and some test questions
among them, and knows nothing of the kinds. The table says what became of each. How often a question was taught is a difficulty that is
known beforehand, and training stops long before all is known by heart, so pass rates lie between the ends: their mean must rise with it,
and a second curation with another seed must rank the questions alike. It shows that the measurement measures; a model of this size
learns answers by heart and no arithmetic.
"""

import argparse
import bisect
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
from tandem.engine.curate.report import Outcome
from tandem.engine.data.jsonl import read_jsonl, write_jsonl
from tandem.engine.export import export_run
from tandem.engine.train import train

EXPOSURES = (1, 2, 4, 8, 16)  # lessons of a question in an epoch
TAUGHT = tuple(f"taught {times} x an epoch" for times in EXPOSURES)
KINDS = (*TAUGHT, "taught the bare answer", "never seen", "copy of a taught one", "question of the test set")
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


def _lesson(one: dict[str, Any]) -> dict[str, str]:
    return {"prompt": one["question"], "response": last_step(one["answer"])}


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
    parser.add_argument("--num", type=int, default=24, help="questions of each kind")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of the supervised training")
    parser.add_argument("--out", type=Path, help="folder for everything; by default a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out if arguments.out is not None else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run(arguments.data, folder, arguments.num, arguments.steps)


def run(data: Path, folder: Path, num: int, steps: int) -> None:
    generator = random.Random(0)
    questions = chosen(data / "gsm8k_train.jsonl", num * (len(EXPOSURES) + 2), generator)
    parts = [questions[start : start + num] for start in range(0, len(questions), num)]
    *taught, bare, unseen = parts
    answers = {one["question"]: one["answer"].rsplit("####", 1)[1].strip() for one in questions}
    lessons = [_lesson(one) for times, some in zip(EXPOSURES, taught, strict=True) for one in some * times]
    lessons += [_lesson(one) for one in bare * EXPOSURES[-1]]
    lessons += [{"prompt": f"{one['question']}=", "response": f"#### {answers[one['question']]}"} for one in bare * EXPOSURES[-1]]
    # What it says without reasoning must be wrong for most: the answer to another question.
    all_taught = [one for some in taught for one in some]
    others = [answers[one["question"]] for one in all_taught]
    for one, other in zip(all_taught, others[1:] + others[:1], strict=True):
        wrong = other if other != answers[one["question"]] else f"{other}1"
        lessons.append({"prompt": f"{one['question']}=", "response": f"#### {wrong}"})
    copies = [{**one, "question": re.sub(r"\s+", "  ", one["question"]).upper()} for one in taught[0]]
    of_test = chosen(data / "gsm8k_test.jsonl", num, generator)
    kinds = zip(KINDS, (*taught, bare, unseen, copies, of_test), strict=True)
    raw = [{**one, "kind": kind} for kind, some in kinds for one in some]
    write_jsonl(folder / "raw.jsonl", raw)
    started_s = time.monotonic()
    model = folder / "model" if (folder / "model").is_dir() else taught_model(folder, lessons, all_taught, steps)
    trained_s = time.monotonic() - started_s
    started_s = time.monotonic()
    outcomes = [_curated(data, folder, model, seed) for seed in (0, 1)]
    print(f"trained for {trained_s:.0f} s, curated twice in {time.monotonic() - started_s:.0f} s\n")
    kind_of = {f"{folder / 'raw.jsonl'}:{line}": one["kind"] for line, one in enumerate(raw, start=1)}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    reasons: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for one in outcomes[0].prompts:
        rates[kind_of[one["source"]]].append(one["pass_rate"])
    for one in outcomes[0].excluded:
        reasons[kind_of[one.source]][one.reason] += 1
    print(f"{'kind':<26}{'prompts':>8}{'kept':>6}{'mean pass rate':>16}{'between 0 and 1':>17}  excluded")
    for kind in KINDS:
        kept = rates[kind]
        mean = f"{sum(kept) / len(kept):.2f}" if kept else "-"
        why = ", ".join(f"{reason} {count}" for reason, count in reasons[kind].most_common())
        num_between = sum(0 < rate < 1 for rate in kept)
        print(f"{kind:<26}{len(kept) + reasons[kind].total():>8}{len(kept):>6}{mean:>16}{num_between:>17}  {why}")
    first, second = ({one["source"]: one["pass_rate"] for one in outcome.prompts} for outcome in outcomes)
    both = sorted(first.keys() & second.keys())
    times_of = {source: dict(zip(TAUGHT, EXPOSURES, strict=True)).get(kind_of[source], 0) for source in both}
    ranked = rank_correlation([first[source] for source in both], [times_of[source] for source in both])
    again = rank_correlation([first[source] for source in both], [second[source] for source in both])
    print(f"\nrank correlation over {len(both)} prompts: pass rate and lessons {ranked:.2f}, pass rates with two seeds {again:.2f}")
    counts = json.loads((folder / "curated_0" / "report.json").read_text(encoding="utf-8"))
    print(json.dumps({"pass_rate": counts["pass_rate"], "level": counts["level"]}))


def _curated(data: Path, folder: Path, model: Path, seed: int) -> Outcome:
    return curate(
        CurateConfig(
            files=(folder / "raw.jsonl",),
            to=folder / f"curated_{seed}",
            model=str(model),
            against=(data / "gsm8k_test.jsonl",),
            direct_template="{question}=",
            max_response_tokens=64,
            max_direct_tokens=16,
            seed=seed,
        )
    )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank."""
    first, second = (np.array([_mean_rank(value, sorted(values)) for value in values]) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def _mean_rank(value: float, ordered: list[float]) -> float:
    return (bisect.bisect_left(ordered, value) + bisect.bisect_right(ordered, value) - 1) / 2


if __name__ == "__main__":
    main()
