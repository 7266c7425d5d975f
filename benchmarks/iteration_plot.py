"""Draws docs/iteration.png: the newest whole iteration of a finished run, phase by phase and rank by rank, as `tandem report` shows it.

python benchmarks/iteration_plot.py RUN [--to docs/iteration.png]
"""

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tandem.engine.timeline import colour_of_phases, newest_iteration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "iteration.png")
    args = parser.parse_args()
    ranks = newest_iteration(args.run)
    if not ranks:
        parser.error(f"{args.run}: two iterations must have ended, and trace/ must be there")
    mpl.use("Agg")
    colours = colour_of_phases(ranks)
    figure, axes = plt.subplots(figsize=(10, 0.7 + 0.5 * len(ranks)), layout="constrained")
    for lane, spans in enumerate(ranks.values()):
        for span in spans:  # those that contain others come first
            axes.broken_barh([(span.start_s, span.duration_s)], (lane - 0.4, 0.8), facecolors=colours[span.phase])
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside upper left", ncols=len(colours), frameon=False)
    figure.savefig(args.to, dpi=150)
    for rank, spans in ranks.items():
        seconds = {phase: sum(span.duration_s for span in spans if span.phase == phase) for phase in colours}
        print(f"rank {rank}: " + ", ".join(f"{phase} {value:.4f} s" for phase, value in seconds.items() if value))
    print(f"wrote {args.to}")


if __name__ == "__main__":
    main()
