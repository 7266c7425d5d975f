"""A toy reward model from random weights: it learns, resumes, is exported, and grades."""

import dataclasses
import json
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.config import CheckpointConfig, LogConfig, MeshConfig, ModelConfig, OptimizerConfig, RewardConfig, RunConfig, SFTStage
from tandem.engine.data.arithmetic import preference_pairs
from tandem.engine.data.preferences import load_preferences
from tandem.engine.data.tokenizer import byte_tokenizer
from tandem.engine.feasibility import check_run
from tandem.engine.log import read_metrics
from tandem.engine.recipes.toy_reward_model import toy_reward_model
from tandem.engine.reward.domains import open_grader
from tandem.engine.reward.preference import PreferenceGrader, Scoring
from tandem.engine.train import train
from tandem.engine.types import Prompt, Verdict
from tests.ranks import run_ranks
from tests.small_toy import export, weights_of

STEPS = 350


def learner(run_dir: Path) -> RunConfig:
    """The recipe, which 350 of its steps are enough for."""
    recipe = toy_reward_model()
    (stage,) = recipe.preference
    return dataclasses.replace(
        recipe,
        run_dir=str(run_dir),
        preference=(dataclasses.replace(stage, steps=STEPS),),
        log=LogConfig(tensorboard=False, rollouts_every=0, progress=False),
    )


def brief(run_dir: Path, steps: int, **changes: Any) -> RunConfig:
    """A few steps of a tiny one. The learning rate is constant, so that it does not depend on how many."""
    stage = SFTStage(steps=steps, batch_tokens=600, max_tokens=64, optimizer=OptimizerConfig(lr=1e-3))
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48, context_length=64)
    checkpoint = CheckpointConfig(every=3, keep=4)
    config = learner(run_dir)
    task = dataclasses.replace(config.data.task, num_sft_examples=200, num_test=10)
    data = dataclasses.replace(config.data, task=task)
    return dataclasses.replace(config, **{"data": data, "preference": (stage,), "model": model, "checkpoint": checkpoint, **changes})


def held_out_pairs() -> list[dict[str, str]]:
    return preference_pairs(toy_reward_model().data.task, 60, 1, "test")  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward_model") / "run"
    run_ranks(train, 2, learner(folder))
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    export(run_dir, run_dir.parent / "exported")
    return run_dir.parent / "exported"


@pytest.mark.distributed
def test_it_tells_right_solutions_from_wrong_ones_of_prompts_that_it_never_saw(run_dir: Path) -> None:
    lines = read_metrics(run_dir)
    found = [line["reward_model/held_out_accuracy"] for line in lines if "reward_model/held_out_accuracy" in line]
    # 400 pairs; a coin's standard deviation is 0.025.
    assert 0.3 < found[0] < 0.7
    assert found[-1] > 0.95
    assert lines[-1]["reward_model/loss"] < 0.2 < 0.6 < lines[0]["reward_model/loss"]
    told = json.loads((run_dir / "held_out.json").read_text())
    assert (told["step"], told["num_pairs"], told["accuracy"]) == (STEPS, 400, found[-1])


# In a process of its own: within one that imported the trainer's device layer, from_pretrained leaves rotary buffers unset.
SCORE = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
assert (model.config.num_labels, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
assert model.score.weight.shape == (1, model.config.hidden_size)
batch = tokenizer([text + tokenizer.eos_token for text in json.load(sys.stdin)], padding=True, padding_side="right", return_tensors="pt")
with torch.inference_mode():
    print(json.dumps(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()))
"""


@pytest.fixture(scope="module")
def hf_scores(exported: Path) -> list[tuple[float, float]]:
    """Of `held_out_pairs`, by transformers, in one padded batch."""
    texts = [pair["prompt"] + pair[name] for pair in held_out_pairs() for name in ("chosen", "rejected")]
    command = [sys.executable, "-c", SCORE, str(exported)]
    ended = subprocess.run(command, input=json.dumps(texts), text=True, capture_output=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    scores = json.loads(ended.stdout)
    return list(zip(scores[0::2], scores[1::2], strict=True))


def test_the_exported_folder_is_a_classifier_of_transformers_that_ranks_alike(hf_scores: list[tuple[float, float]]) -> None:
    assert sum(chosen > rejected for chosen, rejected in hf_scores) > 0.9 * len(hf_scores)


def test_the_grader_scores_as_transformers_does_and_knows_a_right_solution(exported: Path, hf_scores: list[tuple[float, float]]) -> None:
    grader = open_grader("preference", RewardConfig(preference_model=str(exported)), num_workers=1)
    try:
        pairs = held_out_pairs()
        graded = [
            grader.grade(pair[name], prompt_of(pair["prompt"]), is_complete=True) for pair in pairs for name in ("chosen", "rejected")
        ]
        verdicts = [verdict.result(240) for verdict in graded if isinstance(verdict, Future)]
        cut = grader.grade(pairs[0]["chosen"], prompt_of(pairs[0]["prompt"]), is_complete=False)
    finally:
        grader.close()
    assert len(verdicts) == 2 * len(pairs)
    assert all(verdict.graded for verdict in verdicts)
    right = [verdict.correct for verdict in verdicts]
    assert sum(right[0::2]) > 0.8 * len(pairs)
    assert sum(right[1::2]) < 0.2 * len(pairs)
    assert cut == Verdict(correct=False, reason="the response was cut")
    found = [float(re.findall(r"score (-?[\d.]+)", verdict.reason)[0]) for verdict in verdicts]
    assert found == pytest.approx([score for pair in hf_scores for score in pair], abs=1e-3)


def test_what_the_grader_cannot_score_is_not_graded(exported: Path) -> None:
    scoring = Scoring.read(exported)
    grader = PreferenceGrader(exported, scoring, num_workers=1, timeout_s=1e-6)
    try:
        late = grader.grade("A:1.", prompt_of("1+1?"), is_complete=True)
        assert isinstance(late, Future)
        verdict = late.result(240)
    finally:
        grader.close()
    assert not verdict.graded
    assert "did not end within 1e-06 s" in verdict.reason
    grader = PreferenceGrader.open(str(exported), threshold=1e9, num_workers=1, timeout_s=240)
    try:
        long, short = (
            grader.grade("1" * 100, prompt_of("1+1?"), is_complete=True),
            grader.grade("A:2.", prompt_of("1+1?"), is_complete=True),
        )
        assert isinstance(long, Future)
        assert isinstance(short, Future)
        assert not long.result(240).graded
        assert "the reward model's context is 64" in long.result().reason
        assert short.result(240).graded
        assert not short.result().correct  # nothing reaches that threshold
    finally:
        grader.close()


def test_a_grader_without_a_reward_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward\.preference_model is None; domain preference needs"):
        open_grader("preference", RewardConfig(), num_workers=1)
    with pytest.raises(ValueError, match=r"scoring\.json cannot be read"):
        open_grader("preference", RewardConfig(preference_model=str(tmp_path)), num_workers=1)


def test_reinforcement_refuses_a_reward_model_as_its_policy(exported: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(learner(tmp_path), preference=(), model=ModelConfig(path=str(exported), context_length=64))
    with pytest.raises(ValueError, match="a reward model, which generates nothing"):
        check_run(config, num_ranks=1, ranks_per_node=1)


@pytest.mark.distributed
def test_a_run_that_is_resumed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(train, 2, brief(tmp_path / "whole", 6))
    run_ranks(train, 2, brief(tmp_path / "cut", 3))
    run_ranks(train, 2, brief(tmp_path / "cut", 6))
    whole, cut = weights_of(tmp_path / "whole", 6), weights_of(tmp_path / "cut", 6)
    assert whole
    assert whole == cut


@pytest.mark.distributed
def test_a_reward_model_starts_on_another_ones_weights(tmp_path: Path) -> None:
    run_ranks(train, 2, brief(tmp_path / "first", 3, mesh=MeshConfig(tp=2)))
    export(tmp_path / "first", tmp_path / "exported")
    none = SFTStage(steps=1, batch_tokens=600, max_tokens=64, optimizer=OptimizerConfig(lr=0.0))
    model = ModelConfig(path=str(tmp_path / "exported"), context_length=64)
    run_ranks(train, 2, brief(tmp_path / "second", 1, model=model, preference=(none,), mesh=MeshConfig(pp=2)))
    export(tmp_path / "second", tmp_path / "again")
    first, again = (tmp_path / name / "model.safetensors" for name in ("exported", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_bad_pairs_name_file_line_and_rule(tmp_path: Path) -> None:
    file, config = tmp_path / "pairs.jsonl", learner(tmp_path).data
    good = {"prompt": "1+1?", "chosen": "2", "rejected": "3", "margin": 0.5}
    for record, message in (
        ({**good, "rejected": "2"}, "pairs.jsonl:2: chosen and rejected are the same text"),
        ({**good, "margin": -1}, "field 'margin' is -1; it must be a number that is not negative"),
        ({"prompt": "1", "chosen": "2"}, "it needs a field rejected"),
        ({**good, "chosen": "9" * 40}, r"prompt and chosen have 46 tokens; shorten them, or raise max_tokens \(20\)"),
    ):
        file.write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
        with pytest.raises(ValueError, match=message):
            load_preferences(file, byte_tokenizer(), config, max_tokens=20)
    file.write_text(json.dumps(good) + "\n")
    (pair,) = load_preferences(file, byte_tokenizer(), config, max_tokens=20)
    assert (pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()) == ([257, *b"1+1?"], [50, 258], [51, 258])
    assert (pair.margin, pair.num_tokens) == (0.5, 14)


def test_planted_pairs_differ_in_one_result_and_what_follows() -> None:
    task = toy_reward_model().data.task
    for pair in preference_pairs(task, 50, 0):  # pyright: ignore[reportArgumentType]
        chosen, rejected = pair["chosen"].split(";"), pair["rejected"].split(";")
        wrong = [step for step in rejected[:-1] if not is_right(step)]
        assert all(map(is_right, chosen[:-1]))
        assert len(wrong) == 1
        assert chosen[-1] != rejected[-1]


def is_right(step: str) -> bool:
    a, b, result = (int(part) for part in re.split("[+=]", step))
    return (a + b) % 5 == result


def prompt_of(text: str) -> Prompt:
    return Prompt(id="p", text=text, token_ids=(1,), answer="", domain="preference")
