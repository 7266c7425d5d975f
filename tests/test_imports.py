"""The import rule of the design, and the few other rules that a parser can check."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for room in ("engine", "kernels") for path in (ROOT / room).rglob("*.py"))

GROUND = {
    "types",
    "config",
    "model_config",
    "rollout_config",
    "task_config",
    "architecture",
    "mesh_rules",
    "routing",
    "quantised",
    "log",
    "kernels",
}
LOG = {"log", "trace", "progress"}  # the log is three files
CONFIG = {"config", "model_config", "rollout_config", "task_config"}  # the configuration is four

# part → parts of ours that it may import, besides itself; a part that is not named stands at the top and may import all of them
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "config": CONFIG,
    "model_config": set(),
    "rollout_config": {"model_config"},
    "task_config": {"model_config"},
    "architecture": {"types", *CONFIG},  # read by the trainer, the rollout engine and the name map alike
    "mesh_rules": {"architecture", *CONFIG},  # read by the trainer and by the check before a run
    "routing": {"architecture"},  # by the trainer's routers and the rollout engine's
    "quantised": {"types", "architecture", "kernels"},  # by the sender of weights, by their receiver, and by the check before a run
    "kernels": set(),
    "loop_thread": set(),  # of the clients of SGLang and of a judge's model
    "buckets": {"types", "device_buckets"},
    "device_buckets": set(),
    "trace": set(),
    "progress": set(),
    "log": {*CONFIG, *LOG},
    "hardware": CONFIG,
    "data": GROUND,
    "rollout": {*GROUND, "buckets", "loop_thread"},
    "reward": {*GROUND, "loop_thread"},
    "algo": GROUND,
    "trainer": {*GROUND, "algo"},
    "checkpoint": {"types", *CONFIG, "architecture", "quantised", "log", "buckets", "kernels"},  # a kernel packs what lies on a GPU
}


def part_of(module: str) -> str:
    """The room or file that a module belongs to: tandem.engine.data.replay → data."""
    names = module.split(".")
    return "kernels" if names[1] == "kernels" else names[2] if len(names) > 2 else names[1]


def module_of(path: Path) -> str:
    names = ["tandem", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, wherever in the file it stands."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            if module in ("tandem", "tandem.engine"):  # "from tandem.engine import log" names a part
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_a_part_imports_only_what_the_design_lets_it() -> None:
    wrong = []
    for path in SOURCES:
        part = part_of(module_of(path))
        allowed = ALLOWED.get(part, set()) | {part}
        for line, name in imports(path):
            if part in ALLOWED and name.split(".")[0] == "tandem" and part_of(name) not in allowed:
                wrong.append(f"{at(path, line)} imports {name}; {part} may import {', '.join(sorted(allowed))}")
    assert not wrong, "\n".join(wrong)


def test_each_file_has_one_import_name_and_nothing_imports_tests_or_benchmarks() -> None:
    foreign = ("engine", "kernels", "tests", "benchmarks")
    wrong = [f"{at(path, line)} imports {name}" for path in SOURCES for line, name in imports(path) if name.split(".")[0] in foreign]
    assert not wrong, "\n".join(wrong)


def test_the_top_folders_are_namespaces() -> None:
    assert not (ROOT / "engine/__init__.py").exists()
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's package `kernels`"


def test_only_run_reads_environment_variables() -> None:
    names = {"environ", "environb", "getenv"}
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            attribute = isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os"
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}
            if isinstance(node, ast.Attribute | ast.ImportFrom) and (attribute or imported) and path != ROOT / "engine/run.py":
                wrong.append(f"{at(path, node.lineno)} reads the environment; engine/run.py does that")
    assert not wrong, "\n".join(wrong)


def test_a_file_is_one_subject_of_at_most_400_lines() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    wrong = [f"{path.relative_to(ROOT)} has {count} lines; split it by subject" for path, count in lines.items() if count > 400]
    assert not wrong, "\n".join(wrong)


def test_the_rule_names_parts_that_exist() -> None:
    parts = {part_of(module_of(path)) for path in SOURCES}
    assert parts >= {"types", "config", *LOG, "data", "rollout", "trainer", "kernels"}


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "engine/data/replay.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..rollout import budget\nfrom . import sampler\nfrom tandem.engine import run\n")
    assert [name for _, name in imports(path)] == ["tandem.engine.rollout", "tandem.engine.data", "tandem.engine.run"]
