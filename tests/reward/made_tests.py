"""What `tandem testgen` left in its folder."""

import json
from pathlib import Path
from typing import Any


def made_tests(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The hidden tests that prompts.jsonl names, by the prompt's id."""
    prompts = [json.loads(line) for line in (out / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    return {prompt["id"]: json.loads(Path(prompt["grading"]["tests"]).read_text(encoding="utf-8")) for prompt in prompts}
