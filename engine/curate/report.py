"""The report of a curation: counts at each step and histograms, as JSON, Markdown and one PNG."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.curate.config import CurateConfig
from tandem.engine.curate.records import REASONS, Excluded

JSON_FILE, MARKDOWN_FILE, PNG_FILE = "report.json", "report.md", "report.png"
_NUM_EXAMPLES = 3  # of each reason, in the Markdown
_EXAMPLE_CHARS = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    num_read: int
    prompts: Sequence[Mapping[str, Any]]  # lines of the curated file
    excluded: Sequence[Excluded]

    def counts(self, config: CurateConfig) -> dict[str, Any]:
        """JSON: the steps in their order, each with what it excluded and what it left; and histograms of the prompts that are kept.

        pass_rate counts by tenths: prompts at 0.3 have a rate of at least 0.3 and less than 0.4; those solved always stand at 1.0.
        """
        reasons = Counter(one.reason for one in self.excluded)
        steps, left = [], self.num_read
        for reason in REASONS:
            left -= reasons[reason]
            steps.append({"reason": reason, "excluded": reasons[reason], "left": left})
        rates = [prompt["pass_rate"] for prompt in self.prompts]
        tenths = Counter(int(rate * 10 + 1e-6) for rate in rates)
        return {
            "num_read": self.num_read,
            "num_kept": len(self.prompts),
            "steps": steps,
            "mean_pass_rate": sum(rates) / len(rates) if rates else None,
            "pass_rate": {f"{tenth / 10:.1f}": tenths[tenth] for tenth in range(11)},
            "level": {str(level): sum(p["level"] == level for p in self.prompts) for level in range(len(config.level_bounds) + 1)},
            "discipline": dict(Counter(str(prompt["discipline"]) for prompt in self.prompts).most_common()),
            "domain": dict(Counter(str(prompt["domain"]) for prompt in self.prompts).most_common()),
        }


def write_report(outcome: Outcome, config: CurateConfig) -> None:
    """report.json, report.md and report.png in `config.to`."""
    counts = outcome.counts(config)
    (config.to / JSON_FILE).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    (config.to / MARKDOWN_FILE).write_text(_markdown(counts, outcome, config), encoding="utf-8", errors="backslashreplace")
    _draw(counts, config.to / PNG_FILE)


def _markdown(counts: Mapping[str, Any], outcome: Outcome, config: CurateConfig) -> str:
    lines = [
        "# Curation",
        "",
        f"{counts['num_kept']} of {counts['num_read']} prompts of {', '.join(map(str, config.files))} are kept. "
        f"Model: {config.model}; {config.num_samples} responses each at temperature {config.temperature:g}, "
        f"{config.num_direct} tries without reasoning.",
        "",
        "| step | excluded | left |",
        "|---|---|---|",
        f"| read | | {counts['num_read']} |",
        *(f"| {step['reason']} | {step['excluded']} | {step['left']} |" for step in counts["steps"]),
        "",
        f"![pass rates, levels, disciplines and exclusions]({PNG_FILE})",
    ]
    for name in ("pass_rate", "level", "discipline", "domain"):
        lines += ["", f"| {name} | prompts |", "|---|---|", *(f"| {value} | {count} |" for value, count in counts[name].items())]
    levels = ", ".join(f"{level}: below {bound:g}" for level, bound in enumerate(config.level_bounds, start=1))
    lines += ["", f"Levels by pass rate: 0 is the easiest; {levels}.", "", "## Examples of what was excluded"]
    for reason in REASONS:
        examples = [one for one in outcome.excluded if one.reason == reason][:_NUM_EXAMPLES]
        lines += [
            "",
            f"**{reason}**",
            "",
            *(f"- {one.source}: {_one_line(one.detail)} — `{_one_line(one.question)}`" for one in examples),
        ] * bool(examples)
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())[:_EXAMPLE_CHARS]


def _draw(counts: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure  # takes half a second; a Figure of its own needs no display and leaves no global state

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    excluded = {step["reason"]: step["excluded"] for step in counts["steps"]}
    for axes, title, bars in (
        (panels[0, 0], "pass rate", counts["pass_rate"]),
        (panels[0, 1], "curriculum level", counts["level"]),
        (panels[1, 0], "discipline", counts["discipline"]),
        (panels[1, 1], "excluded", {**excluded, "kept": counts["num_kept"]}),
    ):
        drawn = axes.bar(list(bars), list(bars.values()))
        axes.bar_label(drawn, fontsize=8)
        axes.set_title(f"{title} (prompts)")
        if max(map(len, bars), default=0) > 4:
            axes.tick_params(axis="x", rotation=60, labelsize=8)
    figure.savefig(file, dpi=100)
