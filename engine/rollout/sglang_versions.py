"""What differs between the versions of SGLang that the client knows."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

_ENVIRONMENT = ".sglang"
_FIRST, _LAST = (0, 5, 17), (0, 5, 23)
_ASK = "import importlib.metadata as m; print(m.version('sglang'))"
_ASK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class SGLangVersion:
    """A version whose API the client knows. Raises: ValueError naming the known ones for another."""

    text: str

    def __post_init__(self) -> None:
        if not _FIRST <= self.number <= _LAST:
            first, last = (".".join(map(str, number)) for number in (_FIRST, _LAST))
            raise ValueError(f"SGLang is version {self.text}; the client knows {first} to {last}. Set rollout.sglang.python to one of them")

    @property
    def number(self) -> tuple[int, ...]:
        """Releases only: 0.5.21.post1 has the API of 0.5.21, and a development version counts as none."""
        parts = self.text.split(".")[:3]
        return tuple(map(int, parts)) if all(part.isdigit() for part in parts) and "dev" not in self.text else ()

    @property
    def has_update_sessions(self) -> bool:
        """Whether weights are taken between /begin_weight_update and /end_weight_update only."""
        return self.number >= (0, 5, 21)


def find_python(configured: str | None) -> Path:
    """The interpreter of SGLang's environment: the configured one, or that of `make sglang`.

    Raises: FileNotFoundError saying how to get one.
    """
    if configured is not None:
        path = Path(configured).absolute()
        if not path.exists():
            raise FileNotFoundError(f"rollout.sglang.python is {configured}, which does not exist; None takes {_ENVIRONMENT}/bin/python")
        return path
    here, repository = Path.cwd(), Path(__file__).parents[2]
    candidates = [folder / _ENVIRONMENT / "bin" / "python" for folder in dict.fromkeys((here, repository))]
    for path in candidates:
        if path.exists():
            return path
    looked = " or ".join(map(str, candidates))
    raise FileNotFoundError(f"SGLang's environment is not at {looked}; run `make sglang`, or set rollout.sglang.python to its interpreter")


def version_of(python: Path) -> SGLangVersion:
    """The version of SGLang in an environment. Raises: ValueError if there is none, or an unknown one."""
    done = subprocess.run([str(python), "-c", _ASK], capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise ValueError(f"{python} has no SGLang; run `make sglang`, or set rollout.sglang.python to an interpreter that has it")
    return SGLangVersion(done.stdout.strip())
