"""The command line: every field explained, every mistake answered."""

import ast
import dataclasses
import inspect
import re
import statistics
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from tandem.engine import cli, config, errors
from tandem.engine.config import RewardConfig, RunConfig, SFTStage
from tandem.engine.errors import clear_errors
from tandem.engine.recipes import registry
from tandem.engine.recipes.registry import RECIPES, parse_launch, parse_recipe


def config_classes() -> list[type[Any]]:
    """RunConfig and every dataclass that it holds."""
    found: list[type[Any]] = []

    def visit(kind: Any) -> None:
        for part in typing.get_args(kind):
            visit(part)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind not in found:
            found.append(kind)
            for hint in typing.get_type_hints(kind).values():
                visit(hint)

    visit(RunConfig)
    return found


def documented_fields() -> dict[str, set[str]]:
    """Of each class, the fields that have a text under them in its source."""
    documented: dict[str, set[str]] = {}
    modules = {inspect.getmodule(kind) for kind in config_classes()}
    for node in [node for module in modules if module is not None for node in ast.parse(inspect.getsource(module)).body]:
        if isinstance(node, ast.ClassDef):
            pairs = zip(node.body, node.body[1:], strict=False)
            documented[node.name] = {
                field.target.id
                for field, text in pairs
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            }
    return documented


def test_every_field_of_a_run_has_a_text() -> None:
    documented = documented_fields()
    missing = [
        f"{kind.__name__}.{field.name}"
        for kind in config_classes()
        for field in dataclasses.fields(kind)
        if field.name not in documented[kind.__name__] and not dataclasses.is_dataclass(typing.get_type_hints(kind)[field.name])
    ]
    assert missing == []
    assert all(kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(") for kind in config_classes())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_help_of_a_recipe_explains_every_field(recipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        parse_launch([recipe.__name__, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out

    def leaves(value: Any, prefix: str = "") -> list[str]:
        names = []
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            names += leaves(inner, f"{prefix}{field.name}.") if dataclasses.is_dataclass(inner) else [prefix + field.name]
        return names

    for name in leaves(recipe()):
        if name not in ("sft", "preference"):  # their stages are options of their own
            assert re.search(rf"--{re.escape(name)} \S", shown), name
    assert "--nproc INT" in shown
    assert "Softmax temperature of sampling" in shown


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_recipe_is_a_valid_run_named_like_its_function(recipe: Any) -> None:
    assert recipe().name == recipe.__name__
    assert recipe.__doc__, "its first line is shown in the list of recipes"


def small() -> RunConfig:
    """A run with a warm start."""
    optimizer = config.OptimizerConfig(lr=1e-3)
    return RunConfig(name="small", sft=(SFTStage(steps=3, batch_tokens=100, max_tokens=50, optimizer=optimizer),))


def test_fields_change_by_their_dotted_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RECIPES", (small,))
    args = ["--rollout.temperature", "0.5", "--log.progress", "False", "--rollout.token_budget", "900", "--mesh.tp=2", "--steps", "7"]
    parsed = parse_recipe(["small", *args])
    assert (parsed.rollout.temperature, parsed.log.progress, parsed.rollout.token_budget, parsed.mesh.tp, parsed.steps) == (
        0.5,
        False,
        900,
        2,
        7,
    )
    assert parsed.sft == small().sft
    assert dataclasses.replace(parsed, rollout=small().rollout, log=small().log, mesh=small().mesh, steps=small().steps) == small()


def test_a_stage_of_the_warm_start_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RECIPES", (small,))
    [stage] = parse_recipe(["small", "--sft.0.steps", "9", "--sft.0.optimizer.lr", "0.5"]).sft
    assert (stage.steps, stage.batch_tokens, stage.optimizer.lr) == (9, 100, 0.5)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["no recipe was named", "toy_cpu"]),
        (["toy_cp"], ["'toy_cp' is no recipe", "did you mean toy_cpu?", "known recipes: "]),
        (["zzz"], ["'zzz' is no recipe", "known recipes: toy_cpu"]),
        (["toy_cpu", "--rollout.temprature", "1"], ["--rollout.temprature", "--rollout.temperature"]),
        (["toy_cpu", "--rollout.temperature", "-1"], ["rollout.temperature is -1.0", "must be positive"]),
        (["toy_cpu", "--rollout.temperature", "warm"], ["--rollout.temperature", "'warm'"]),
    ],
)
def test_a_mistake_ends_with_status_2_and_says_what_is_right(argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_launch(argv)
    assert ended.value.code == 2
    shown = " ".join(re.sub("[│╭╰╮╯─]", " ", "".join(capsys.readouterr())).split())
    for part in parts:
        assert part in shown


def test_every_sub_command_has_help_that_explains_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        ("--help",): ["train", "export", "evaluate", "report"],
        ("train", "--help"): ["toy_cpu", "RECIPE"],
        ("report", "--help"): ["Run folder."],
        ("export", "--help"): ["Run folder.", "--to PATH"],
        ("evaluate", "--help"): ["--prompts PATH", "in tokens"],
    }
    for argv, parts in texts.items():
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        shown = capsys.readouterr().out
        assert ended.value.code == 0
        assert all(part in shown for part in parts), shown


def test_a_report_on_a_folder_that_is_no_run_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert "is no run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        (["toy_cpu", "--nproc", "2", "--steps", "3"], ["toy_cpu", "--steps", "3"]),
        (["toy_cpu", "--steps", "3", "--nproc=2"], ["toy_cpu", "--steps", "3"]),
        (["toy_cpu"], ["toy_cpu"]),
    ],
)
def test_the_launcher_keeps_its_own_option(args: list[str], kept: list[str]) -> None:
    assert cli.without_option(args, "--nproc") == kept


def test_several_ranks_are_started_with_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(cli.os, "execv", lambda _, command: started.append(command))
    cli.main(["train", "toy_cpu", "--nproc", "3", "--steps", "1"])
    [command] = started
    assert command[0] == sys.executable
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    assert command[5:] == ["-m", "tandem.engine.train", "toy_cpu", "--steps", "1"]


def test_the_prompt_format_reaches_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def evaluate_model(*args: Any, **options: Any) -> dict[str, float]:
        calls.append((args, options))
        return {"pass_at_1": 0.5}

    monkeypatch.setattr("tandem.engine.evaluate.evaluate_model", evaluate_model)
    paths = tmp_path / "model", tmp_path / "test.jsonl"
    plain = {
        "max_response_tokens": 1024,
        "num_threads": 1,
        "prompt_template": "{question}",
        "use_chat_template": False,
        "reward": RewardConfig(),
    }
    cli.main(["evaluate", str(paths[0]), "--prompts", str(paths[1])])
    cli.main(["evaluate", str(paths[0]), "--prompts", str(paths[1]), "--prompt_template", "Q: {question}", "--use_chat_template"])
    judge = ["--reward.judge_url", "http://judge-1:8000/v1", "--reward.sandbox_url", "http://sandbox-1:8600"]
    cli.main(["evaluate", str(paths[0]), "--prompts", str(paths[1]), *judge])
    templates = {"prompt_template": "Q: {question}", "use_chat_template": True}
    graded = {"reward": RewardConfig(judge_url="http://judge-1:8000/v1", sandbox_url="http://sandbox-1:8600")}
    assert calls == [(paths, plain), (paths, plain | templates), (paths, plain | graded)]
    assert capsys.readouterr().out == "pass_at_1: 0.5000\n" * 3


def test_a_bad_line_of_the_prompts_ends_a_run_with_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": "2+2?"}\n')
    options = ["--run_dir", tmp_path / "run", "--data.prompts", tmp_path / "prompts.jsonl", "--data.task.num_sft_examples", "1"]
    command = [sys.executable, "-m", "tandem.engine.cli", "train", "toy_cpu", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {tmp_path / 'prompts.jsonl'}:2: ")
    assert "needs a field answer" in line
    assert "Traceback" not in done.stdout + done.stderr


def test_an_error_within_a_library_keeps_its_traceback() -> None:
    with pytest.raises(statistics.StatisticsError, match="n must be at least 1"), clear_errors():  # a ValueError
        statistics.quantiles([1.0, 2.0], n=0)


@pytest.mark.distributed
def test_an_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os\n"
        "from tandem.engine import errors\n"
        "from tandem.engine.config import MeshConfig\n"
        "errors.RANK_0_FIRST_S = 60.0\n"
        "with errors.clear_errors(int(os.environ['RANK'])):\n"
        "    MeshConfig(tp=0)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines().count("error: mesh.tp is 0; it must be at least 1") == 1, done.stderr


def test_an_error_that_rank_0_does_not_have_is_said_by_another(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "RANK_0_FIRST_S", 0.0)
    with pytest.raises(SystemExit) as ended, clear_errors(rank=1):
        config.MeshConfig(tp=0)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: mesh.tp is 0; it must be at least 1\n"


def test_help_starts_without_importing_torch() -> None:
    code = "import sys, tandem.engine.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
