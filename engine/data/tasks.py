"""The generated tasks as a run needs them: prompts to train on, and files of the same form as a user's own."""

from pathlib import Path
from typing import Any

from tandem.engine.config import ProgramTask
from tandem.engine.data import arithmetic, programs
from tandem.engine.data.generated import Split, Task
from tandem.engine.data.jsonl import write_jsonl


def prompts(task: Task, n: int, seed: int, split: Split = "train") -> list[dict[str, Any]]:
    """`n` different prompts of a split, as the task's generator makes them. Raises: ValueError when it has fewer."""
    if isinstance(task, ProgramTask):
        return programs.prompts(task, n, seed, split)
    return arithmetic.prompts(task, n, seed, split)


def sft_examples(task: Task, n: int, seed: int) -> list[dict[str, str]]:
    """`n` supervised examples of the train split, as the task's annotator writes them."""
    if isinstance(task, ProgramTask):
        return programs.sft_examples(task, n, seed)
    return arithmetic.sft_examples(task, n, seed)


def write_task(task: Task, folder: str | Path, *, seed: int) -> None:
    """Write prompts.jsonl, sft.jsonl, validation.jsonl and eval.jsonl (the test split) into `folder`.

    They have the form of a user's own files, which can take their place. Validation and test prompts do not depend on
    the seed: all runs of a task are compared on the same ones.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "prompts.jsonl", prompts(task, task.num_prompts, seed))
    write_jsonl(folder / "sft.jsonl", sft_examples(task, task.num_sft_examples, seed))
    write_jsonl(folder / "validation.jsonl", prompts(task, task.num_validation, 0, "validation"))
    write_jsonl(folder / "eval.jsonl", prompts(task, task.num_test, 0, "test"))
