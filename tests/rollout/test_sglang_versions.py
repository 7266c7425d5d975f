"""Which SGLang there is, and what its version means."""

import sys
from pathlib import Path

import pytest

from tandem.engine.rollout.sglang_versions import SGLangVersion, find_python, version_of


@pytest.mark.parametrize("text", ["0.5.16", "0.4.9.post2", "0.6.0", "0.5.21.dev3"])
def test_a_version_that_the_client_does_not_know_is_refused_with_those_it_knows(text: str) -> None:
    with pytest.raises(ValueError, match=rf"SGLang is version {text}; the client knows 0\.5\.17 to 0\.5\.23\. Set rollout\.sglang\.python"):
        SGLangVersion(text)


def test_update_sessions_came_with_0_5_21() -> None:
    versions = ["0.5.17", "0.5.18", "0.5.20.post1", "0.5.21", "0.5.21.post1", "0.5.23"]
    assert [SGLangVersion(text).has_update_sessions for text in versions] == [False, False, False, True, True, True]


def test_an_environment_that_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tandem.engine.rollout.sglang_versions.__file__", str(tmp_path / "a/b/c/d.py"))
    with pytest.raises(FileNotFoundError, match=r"run `make sglang`, or set rollout\.sglang\.python"):
        find_python(None)
    with pytest.raises(FileNotFoundError, match=r"rollout\.sglang\.python is nowhere/python, which does not exist"):
        find_python("nowhere/python")
    with pytest.raises(ValueError, match="has no SGLang; run `make sglang`"):
        version_of(Path(sys.executable))
