"""`tandem bench`: runs the scripts of benchmarks/, each in a process of its own, with the options as they are given.

The scripts are found beside engine/ in a source tree; an installation has none. Nothing here imports them.
"""

import ast
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class Script:
    """One benchmark."""

    path: Path
    about: str  # first line of its docstring
    on_harness: bool  # takes the options of benchmarks/harness.py


def find_scripts(folder: Path = BENCHMARKS) -> dict[str, Script]:
    """Every script of the folder that can be run, by the stem of its name.

    Raises: ValueError where there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: benchmarks come with the source tree only; clone it and `pip install -e .` there")
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            continue
        assigned = {ast.unparse(target) for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
        about = (ast.get_docstring(tree) or "").partition("\n")[0]
        found[path.stem] = Script(path=path, about=about, on_harness="SUBJECT" in assigned)
    return found


def run_benchmarks(args: Sequence[str], folder: Path = BENCHMARKS) -> int:
    """Names of benchmarks, then options for them; without names, all that are on the harness. Returns the highest exit status.

    Raises: ValueError for a name that no script has.
    """
    scripts = find_scripts(folder)
    num_names = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    names, options = args[:num_names], args[num_names:]
    if not names and ("-h" in options or "--help" in options):
        print(_help(scripts))
        return 0
    for name in names:
        if name not in scripts:
            raise ValueError(f"no benchmark is called {name!r}; there are {', '.join(scripts)}")
    status = 0
    for name in names or [name for name, script in scripts.items() if script.on_harness]:
        ended = subprocess.run([sys.executable, str(scripts[name].path), *options], check=False).returncode
        if ended:
            print(f"error: benchmark {name} ended with status {ended}", file=sys.stderr, flush=True)
        status = max(status, ended if ended >= 0 else 128 - ended)
    return status


def _help(scripts: dict[str, Script]) -> str:
    def listed(on_harness: bool) -> str:
        return "\n".join(f"  {name:<18}{script.about}" for name, script in scripts.items() if script.on_harness == on_harness)

    return (
        "usage: tandem bench [NAME ...] [options]\n\n"
        "Without a name: all kernels. `tandem bench NAME --help` explains the options, which kernels have in common.\n\n"
        f"kernels:\n{listed(True)}\n\nothers, each with options of its own:\n{listed(False)}"
    )
