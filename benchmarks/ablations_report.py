"""From finished runs of benchmarks/ablations.py: docs/ablations.md, its plots, and JSON lines for benchmarks/baselines.

python benchmarks/ablations_report.py [--runs runs/ablations] [--baseline benchmarks/baselines/cpu_2core.jsonl]
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from ablations import ARMS, ROOT, WORK_FILE, is_complete, recipe  # beside this file
from matplotlib import pyplot as plt

from tandem.engine.log import read_metrics
from tandem.engine.report import merge_by_step

COLOURS = ("#2f6bd8", "#d9772b", "#3a9d6a")
LABELS = {
    "base": "base",
    "rest": "ReST",
    "uniform": "uniform",
    "length_on": "length reward from the start",
    "length_warmup": "length reward, warm-up",
    "partial": "partial rollouts, stale tokens masked",
    "partial_train": "partial rollouts, stale tokens trained",
}


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One finished run: per evaluation the iteration, tokens generated so far, pass@1 and greedy response length."""

    arm: str
    seed: int
    steps: list[int]
    tokens: list[int]
    pass_at_1: list[float]
    response_tokens: list[float]
    decode_steps_per_1k: float  # of the rollout phases, per thousand generated tokens
    cpu_s_per_1k: float
    rollout_over_evaluation: float  # wall-clock seconds per token of the rollout phases over those of the same run's evaluations
    stale: float  # share of the tokens that an earlier policy generated

    @property
    def mean_pass(self) -> float:
        """Of all evaluations after the start: the area under the curve."""
        return statistics.mean(self.pass_at_1[1:])


def load(runs: Path, arm: str, seed: int) -> ArmRun:
    """Read a run folder."""
    folder = runs / f"{arm}_{seed}"
    rows: list[dict[str, Any]] = merge_by_step(read_metrics(folder))
    work = [json.loads(line) for line in (folder / WORK_FILE).read_text().splitlines()]
    generated = np.cumsum([0] + [row["rollout/new_tokens"] for row in rows if "rollout/new_tokens" in row])
    evaluated = [row for row in rows if row.get("eval/pass_at_1") is not None]
    num_tokens = sum(phase["num_tokens"] for phase in work)
    evaluated_tokens = sum(row["eval/response_tokens"] for row in evaluated) * recipe(seed).data.task.num_test
    seconds = {name: sum(row.get(f"phase_s/{name}") or 0.0 for row in rows) for name in ("rollout", "grade", "evaluate")}
    rollout_s_per_token = (seconds["rollout"] + seconds["grade"]) / num_tokens
    done = [row for row in rows if row.get("rollout/stale_tokens") is not None]
    return ArmRun(
        arm=arm,
        seed=seed,
        steps=[row["step"] for row in evaluated],
        tokens=[int(generated[row["step"]]) for row in evaluated],
        pass_at_1=[row["eval/pass_at_1"] for row in evaluated],
        response_tokens=[row["eval/response_tokens"] for row in evaluated],
        decode_steps_per_1k=1000 * sum(phase["decode_steps"] for phase in work) / num_tokens,
        cpu_s_per_1k=1000 * sum(phase["cpu_s"] for phase in work) / num_tokens,
        rollout_over_evaluation=rollout_s_per_token / (seconds["evaluate"] / evaluated_tokens),
        stale=statistics.mean(row["rollout/stale_tokens"] for row in done),
    )


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"


def difference(of: dict[str, list[ArmRun]], arm: str, measure: Callable[[ArmRun], float], against: str = "base") -> str:
    """Mean of the seed-by-seed differences, how they spread, and how many of them are positive."""
    other = {run.seed: measure(run) for run in of[against]}
    found = [measure(run) - other[run.seed] for run in of[arm] if run.seed in other]
    return f"{spread(found, '+.3f').replace('± +', '± ')}, {sum(x > 0 for x in found)} of {len(found)} seeds above"


def at_tokens(run: ArmRun, tokens: float) -> float:
    """pass@1 after that many generated tokens, linear between evaluations."""
    return float(np.interp(tokens, run.tokens, run.pass_at_1))


def at_equal_tokens(of: dict[str, list[ArmRun]], arm: str) -> str:
    """The difference to full rollouts when the run that generates least ends."""
    least = min(run.tokens[-1] for runs in (of["base"], of[arm]) for run in runs)
    return difference(of, arm, lambda run: at_tokens(run, least))


def draw(of: dict[str, list[ArmRun]], arms: Sequence[str], to: Path, *, by_tokens: bool = False, labels: Sequence[str] = ()) -> None:
    """pass@1 and response length, the seeds thin and their mean thick."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a94a3"})
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for arm, colour, label in zip(arms, COLOURS, labels or [LABELS[arm] for arm in arms], strict=False):
        runs = of[arm]
        xs = [[tokens / 1000 for tokens in run.tokens] if by_tokens else [float(step) for step in run.steps] for run in runs]
        grid = np.linspace(0, min(x[-1] for x in xs), 60)
        for axis, metric in zip(axes, ("pass_at_1", "response_tokens"), strict=True):
            for run, x in zip(runs, xs, strict=True):
                axis.plot(x, getattr(run, metric), color=colour, linewidth=0.8, alpha=0.45)
            mean = np.mean([np.interp(grid, x, getattr(run, metric)) for run, x in zip(runs, xs, strict=True)], axis=0)
            axis.plot(grid, mean, color=colour, linewidth=2.2, label=label)
    for axis, title in zip(axes, ("pass@1, held-out, greedy", "held-out response length (tokens)"), strict=True):
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("generated tokens (thousands)" if by_tokens else "iteration")
        axis.grid(axis="y", color="#e3e7ec", linewidth=0.8)
    axes[1].set_ylim(0, None)
    axes[0].legend(frameon=False, loc="lower right")
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=120)
    plt.close(figure)


def table(of: dict[str, list[ArmRun]]) -> str:
    """Markdown: one row per arm."""
    lines = [
        "| arm | seeds | pass@1 at the start | mean over the run | at the end | greedy length at the end (tokens) | stale tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, runs in of.items():
        start, mean = spread([run.pass_at_1[0] for run in runs]), spread([run.mean_pass for run in runs])
        end, length = spread([run.pass_at_1[-1] for run in runs]), spread([run.response_tokens[-1] for run in runs], ".1f")
        stale = f"{statistics.mean(run.stale for run in runs):.0%}"
        lines.append(f"| {LABELS[arm]} | {len(runs)} | {start} | {mean} | {end} | {length} | {stale} |")
    return "\n".join(lines)


def partial_table(of: dict[str, list[ArmRun]]) -> str:
    """Markdown: what equal tokens cost, and what they teach."""
    arms = [arm for arm in ("base", "partial", "partial_train") if arm in of]
    least = min(run.tokens[-1] for arm in arms for run in of[arm])
    title = f"pass@1 at {least / 2000:.0f}k / {least / 1000:.0f}k tokens"
    lines = [
        f"| arm | decode steps per 1000 tokens | engine CPU s per 1000 tokens | rollout s per token / evaluation s per token | {title} |",
        "|---|---|---|---|---|",
    ]
    for arm in arms:
        runs = of[arm]
        name = "full rollouts (base)" if arm == "base" else LABELS[arm]
        steps, cpu = spread([run.decode_steps_per_1k for run in runs], ".2f"), spread([run.cpu_s_per_1k for run in runs], ".4f")
        ratio = spread([run.rollout_over_evaluation for run in runs], ".2f")
        half, end = (spread([at_tokens(run, tokens) for run in runs]) for tokens in (least / 2, least))
        lines.append(f"| {name} | {steps} | {cpu} | {ratio} | {half} / {end} |")
    return "\n".join(lines)


def write_page(of: dict[str, list[ArmRun]], to: Path) -> None:
    """docs/ablations.md: its text says what is compared, the numbers say what came out."""
    base, sampling = recipe(0), recipe(0).sampling
    changes = "\n".join(f"- {LABELS[arm]}: {difference(of, arm, lambda run: run.mean_pass)}" for arm in of if arm != "base")
    text = f"""# The paper's ablations in miniature

`python benchmarks/ablations.py` made this page: a smaller toy recipe ({base.model.num_layers} layers of {base.model.hidden_size}, chains of
2 to {base.data.task.max_operations} operations, {base.steps} iterations of {sampling.groups_in_flight} prompts with \
{sampling.num_samples} responses each, one core), one thing changed at a time.
All arms of a seed go on from the same supervised warm start, so compare seed by seed: the seeds differ more than the arms do. Numbers are
mean ± standard deviation over the seeds; pass@1 is greedy, on {base.data.task.num_test} held-out prompts
(its own standard error is about 0.02). Learning rate, tau and scale were chosen for mirror descent, on the larger toy, and are the same in
all arms. Three seeds show large effects only.

{table(of)}

Differences to the base, seed by seed, in pass@1 averaged over the run:

{changes}

## Mirror descent against ReST

![mirror descent against ReST](ablation_rest.png)

ReST fits the correct responses and ignores the wrong ones (the paper's Fig. 10 has it behind). Here, ReST minus mirror descent at the end:
{difference(of, "rest", lambda run: run.pass_at_1[-1])}.

## Curriculum and prioritised sampling against uniform

![curriculum and prioritised against uniform](ablation_sampling.png)

Uniform minus curriculum with priorities, at the end: {difference(of, "uniform", lambda run: run.pass_at_1[-1])}.

## Length reward: off, on, warm-up

![length reward off, on, warm-up](ablation_length.png)

Weight 0.5, from iteration 0 or from iteration {base.steps // 2} (reached over 4). Against no length reward, at the end: from the start
{difference(of, "length_on", lambda run: run.pass_at_1[-1])}; with warm-up {difference(of, "length_warmup", lambda run: run.pass_at_1[-1])}.

## Partial against full rollouts, at equal tokens

![partial against full rollouts](ablation_partial.png)

Full: a phase ends when the last of {sampling.groups_in_flight} groups is complete. Partial: 48 groups are in flight, a phase ends after
7,500 tokens, and what is unfinished goes on in the next. {base.rollout.max_batch} rows decode at a time. Decode steps are counted, and
are what a GPU's time goes by; on a CPU a step with fewer rows is cheaper. The engine's CPU seconds and the wall-clock time, given
against that of the same run's evaluations, depend on what else the machine does. The horizontal axis is generated tokens.
Partial minus full after equal tokens: stale tokens masked {at_equal_tokens(of, "partial")}; trained {at_equal_tokens(of, "partial_train")}.

{partial_table(of)}
"""
    to.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--baseline", type=Path, help="append one JSON line per run to this file")
    args = parser.parse_args()
    seeds = sorted(int(folder.name.removeprefix("warm_")) for folder in args.runs.glob("warm_*"))
    of = {arm: [load(args.runs, arm, s) for s in seeds if is_complete(args.runs / f"{arm}_{s}", recipe(s).steps)] for arm in ARMS}
    missing = [arm for arm, runs in of.items() if not runs]
    if missing:
        parser.error(f"no finished run of {', '.join(missing)} in {args.runs}; run benchmarks/ablations.py first")
    draw(of, ("base", "rest"), args.docs / "ablation_rest.png", labels=("mirror descent", "ReST"))
    draw(of, ("base", "uniform"), args.docs / "ablation_sampling.png", labels=("curriculum, prioritised", "uniform"))
    draw(of, ("base", "length_on", "length_warmup"), args.docs / "ablation_length.png", labels=("off", "on", "warm-up"))
    draw(
        of,
        ("base", "partial", "partial_train"),
        args.docs / "ablation_partial.png",
        by_tokens=True,
        labels=("full", "partial, stale tokens masked", "partial, stale tokens trained"),
    )
    write_page(of, args.docs / "ablations.md")
    if args.baseline is not None:
        with args.baseline.open("a") as file:
            for run in (run for runs in of.values() for run in runs):
                file.write(json.dumps({"benchmark": "ablations", **vars(run)}) + "\n")
    print(table(of), partial_table(of), sep="\n\n")


if __name__ == "__main__":
    main()
