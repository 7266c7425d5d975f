"""How programs of each language are compiled and started inside the sandbox."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tandem.engine.reward.execution import MIB, Limits

Language = Literal["python", "cpp", "javascript", "java"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
# compilers are not held to the limits of the programs that they compile
COMPILER_LIMITS = Limits(wall_s=60, cpu_s=60, memory_bytes=1024 * MIB, scratch_bytes=256 * MIB, file_bytes=128 * MIB)
_TOOL = {"python": (), "cpp": ("g++",), "javascript": ("node",), "java": ("javac", "jar", "java")}
_JVM_BYTES_BESIDE_HEAP = 128 * MIB
_PUBLIC_CLASS = re.compile(r"^\s*public\s+(?:final\s+|abstract\s+)*class\s+(\w+)", re.MULTILINE)


class LanguageError(ValueError):
    """A language that is not known, or whose tools this machine lacks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to put into the program's folder, and what to start there. Paths are the sandbox's."""

    main: str
    """File of the source."""
    compile_argv: tuple[str, ...] | None
    artefact: str | None
    """File that the compiler leaves, and that a run needs instead of the source."""
    argv: tuple[str, ...] | None
    """None: Python, in the waiting interpreter."""
    reserves: bool
    """Whether the language's runtime maps far more memory than it uses."""


def missing_tools(language: str) -> list[str]:
    """Commands that the language needs and the PATH lacks.

    Raises: LanguageError for a language that is not known.
    """
    if language not in LANGUAGES:
        raise LanguageError(f"language is {language!r}; it must be one of {', '.join(LANGUAGES)}")
    return [tool for tool in _TOOL[language] if shutil.which(tool) is None]


def tool_folders() -> list[Path]:
    """Prefixes of the installed tools that lie outside /usr, read-only in the sandbox."""
    folders = []
    for tools in _TOOL.values():
        for tool in tools:
            found = shutil.which(tool)
            if found is not None and not Path(found).resolve().is_relative_to("/usr"):
                folders.append(Path(found).resolve().parents[1])
    return list(dict.fromkeys(folders))


def recipe(source: str, language: str, limits: Limits) -> Recipe:
    """How to run a program.

    Args:
        limits: Of its runs; Java sets its heap by them.
    Raises: LanguageError with the tool to install.
    """
    missing = missing_tools(language)
    if missing:
        raise LanguageError(f"{language} needs {', '.join(missing)} on the PATH; install it, or leave {language} programs out")
    if language == "python":
        return Recipe(main="main.py", compile_argv=None, artefact=None, argv=None, reserves=False)
    if language == "javascript":
        return Recipe(main="main.js", compile_argv=None, artefact=None, argv=(_tool("node"), "main.js"), reserves=True)
    if language == "cpp":
        compiler = (_tool("g++"), "-O2", "-std=c++17", "-o", "main", "main.cpp")
        return Recipe(main="main.cpp", compile_argv=compiler, artefact="main", argv=("/box/main",), reserves=False)
    public = _PUBLIC_CLASS.search(source)
    name = public.group(1) if public else "Main"  # javac wants a public class in the file of its name
    heap = max(limits.memory_bytes - _JVM_BYTES_BESIDE_HEAP, limits.memory_bytes // 2) // MIB
    java = (_tool("java"), f"-Xmx{heap}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-XX:-UsePerfData")
    script = f'"{_tool("javac")}" -d classes {name}.java && "{_tool("jar")}" cf main.jar -C classes .'
    return Recipe(
        main=f"{name}.java",
        compile_argv=("/bin/sh", "-c", script),
        artefact="main.jar",
        argv=(*java, "-cp", "main.jar", name),
        reserves=True,
    )


def _tool(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, name
    return str(Path(found).resolve()) if not found.startswith("/usr") else found
