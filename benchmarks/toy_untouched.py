"""Pass@1 of finished toy runs on test prompts that no run has evaluated, so that nothing can have been tuned on them.

    python benchmarks/toy_untouched.py runs/toy_0 runs/toy_1 runs/toy_2

Draws 1000 further prompts of the test split, leaves out those of every run's eval.jsonl, and evaluates each run's last checkpoint.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tandem.engine.data.jsonl import write_jsonl
from tandem.engine.data.tasks import prompts
from tandem.engine.evaluate import evaluate_model
from tandem.engine.export import export_run
from tandem.engine.recipes.toy_cpu import toy_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    runs = parser.parse_args().runs
    seen = {json.loads(line)["question"] for run in runs for line in (run / "data" / "eval.jsonl").read_text().splitlines()}
    fresh = [record for record in prompts(toy_cpu().data.task, 1000, 20261122, "test") if record["question"] not in seen]
    print(f"{len(fresh)} prompts that no run has evaluated")
    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(Path(folder) / "fresh.jsonl", fresh)
        for run in runs:
            export_run(run, Path(folder) / run.name)
            found = evaluate_model(Path(folder) / run.name, Path(folder) / "fresh.jsonl", max_response_tokens=112)
            print(f"{run.name}: pass@1 {found['pass_at_1']:.3f}, {found['response_tokens']:.1f} tokens")


if __name__ == "__main__":
    main()
