"""What users bring to a run, and what ends it before it starts: prompts, examples, model folders, and settings that do not fit."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from tandem.engine.config import (
    DataConfig,
    LengthPenaltyConfig,
    MeshConfig,
    ModelConfig,
    SamplingConfig,
)
from tandem.engine.evaluate import evaluate_model
from tandem.engine.log import read_metrics
from tandem.engine.recipes.registry import parse_recipe
from tandem.engine.train import train
from tests.ranks import run_ranks
from tests.small_toy import export, small_toy, steps_of

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"


def test_a_prompts_file_of_the_users_own_takes_the_tasks_place(run_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "own.jsonl"
    questions = [f"Ann has {i} apples and buys {i + 2} more. How many has she?" for i in range(12)]
    prompts.write_text("".join(json.dumps({"question": q, "answer": f"… #### {2 * i + 2}"}) + "\n" for i, q in enumerate(questions)))
    config = small_toy(tmp_path / "own", steps=1, data=DataConfig(prompts=str(prompts)), sft=())
    config = dataclasses.replace(config, sampling=SamplingConfig(groups_in_flight=8, num_samples=2))
    run_ranks(train, 2, config)
    (line,) = steps_of(tmp_path / "own")
    assert line["rollout/num_responses"] == 16
    # The context grows to what the longest of them needs.
    longest = max(len(q.encode()) for q in questions) + 1
    assert json.loads((tmp_path / "own" / "config.json").read_text())["model"]["context_length"] == longest + 48
    assert "eval/pass_at_1" not in line  # the task's test set says nothing about these


def test_a_prompt_with_an_image_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    prompts = tmp_path / "own.jsonl"
    prompts.write_text(
        json.dumps({"id": "colour-1", "question": "Which colour?", "answer": "red", "domain": "k12", "image": "red.png"}) + "\n"
    )
    config = small_toy(tmp_path / "run", steps=1, data=DataConfig(prompts=str(prompts)), sft=())
    with pytest.raises(RuntimeError, match=r"prompt 'colour-1' has 1 image\(s\), such as .*red\.png; the models .* no vision tower"):
        run_ranks(train, 2, config)
    assert not (tmp_path / "run" / "config.json").exists()


def test_gsm8k_takes_the_toys_place_by_one_option(tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not there")
    options = ["--data.prompts", str(GSM8K), "--run_dir", str(tmp_path / "gsm8k"), "--steps", "2", "--sft.0.steps", "2"]
    small = ["--sampling.groups_in_flight", "8", "--sampling.num_samples", "2", "--replay.groups_per_update", "4"]
    config = parse_recipe(["toy_cpu", *options, *small])
    run_ranks(train, 2, dataclasses.replace(config, length_penalty=LengthPenaltyConfig(weight=0.5)))
    steps = steps_of(tmp_path / "gsm8k")
    assert len(steps) == 2
    assert all(line["rollout/num_responses"] >= 8 for line in steps)


@pytest.fixture(scope="module")
def exported(warm_started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The warm start as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(warm_started, folder)
    return folder


def test_supervised_training_alone_runs_both_stages_of_the_paper_on_a_folder_and_a_file(exported: Path, tmp_path: Path) -> None:
    examples = tmp_path / "sft.jsonl"
    examples.write_text(
        "".join(json.dumps({"prompt": f"{i}+{j}?", "response": f"A:{(i + j) % 5}."}) + "\n" for i in range(20) for j in range(5))
    )
    options = [
        "--model.path",
        str(exported),
        "--model.context_length",
        "64",
        "--data.sft",
        str(examples),
        "--run_dir",
        str(tmp_path / "sft"),
    ]
    small = ["--rollout.max_response_tokens", "16", "--trainer.dtype", "float32"]
    stages = [f"--sft.{i}.{name}" for i in (0, 1) for name in ("batch_tokens", "max_tokens")]
    config = parse_recipe(
        ["sft_two_stage", *options, *small, *[part for name in stages for part in (name, "256" if "batch" in name else "64")]]
    )
    run_ranks(train, 2, config)
    lines = [line for line in read_metrics(tmp_path / "sft") if line["step"] == -1]
    assert {line["sft/stage"] for line in lines} == {0, 1}
    num_tokens = sum(len(f"{i}+{j}?") + 1 + len("A:0.") for i in range(20) for j in range(5))
    assert {line["sft/step"] for line in lines} == {math.ceil(num_tokens / 256)}
    assert (tmp_path / "sft" / "checkpoints" / "step_00000000").is_dir()


def test_a_model_folder_of_the_users_own_is_trained_without_a_warm_start(exported: Path, warm_started: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    model = ModelConfig(path=str(exported), context_length=64)
    run_ranks(train, 2, small_toy(own, steps=1, model=model))
    (line,) = steps_of(own)
    assert not [line for line in read_metrics(own) if line["step"] == -1]
    first, before = (next(line["eval/pass_at_1"] for line in read_metrics(run) if "eval/pass_at_1" in line) for run in (own, warm_started))
    assert first == before  # the same weights before the first update
    assert json.loads((own / "config.json").read_text())["sft"] == []
    assert line["train/logprob_diff_mean"] < 1e-6


def test_evaluating_the_exported_folder_gives_the_runs_own_pass_at_1(exported: Path, warm_started: Path) -> None:
    (in_run,) = [line["eval/pass_at_1"] for line in read_metrics(warm_started) if line.get("eval/pass_at_1") is not None]
    found = evaluate_model(exported, warm_started / "data" / "eval.jsonl", max_response_tokens=48)
    assert found["num_prompts"] == 40
    assert found["pass_at_1"] == in_run


def test_a_context_that_the_model_was_not_made_for_is_an_error(tmp_path: Path, exported: Path) -> None:
    model = ModelConfig(path=str(exported), context_length=4096)
    with pytest.raises(RuntimeError, match=r"model.context_length is 4096; it must not exceed max_position_embeddings"):
        run_ranks(train, 1, small_toy(tmp_path / "own", model=model))


def test_prompts_that_do_not_exist_and_bad_lines_end_the_run_before_it_starts(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1+1?", "answer": "2"}\nnot json\n')
    with pytest.raises(RuntimeError, match=r"bad.jsonl:2"):
        run_ranks(train, 1, small_toy(tmp_path / "bad", data=DataConfig(prompts=str(bad))))
    with pytest.raises(RuntimeError, match=r"missing.jsonl"):
        run_ranks(train, 1, small_toy(tmp_path / "missing", data=DataConfig(prompts=str(tmp_path / "missing.jsonl"))))


def test_a_run_of_another_model_is_not_resumed(run_dir: Path) -> None:
    model = dataclasses.replace(small_toy(run_dir).model, num_key_value_heads=2)
    with pytest.raises(RuntimeError, match="holds a run with model"):
        run_ranks(train, 1, small_toy(run_dir, model=model))


def test_layers_that_the_stages_do_not_divide_end_the_run_before_it_starts(run_dir: Path) -> None:
    with pytest.raises(RuntimeError, match=r"mesh.pp=2 x mesh.vpp=1 does not divide the model's num_hidden_layers=3"):
        run_ranks(train, 2, small_toy(run_dir, mesh=MeshConfig(pp=2)))
