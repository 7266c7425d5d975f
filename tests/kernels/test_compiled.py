"""The table of compiled kernels: it is complete, nothing in it spills, and kernels compiled again are what it says."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernels import compiled
from tests.kernels.interpreter import HAS_GPU  # before any kernel

ROWS = compiled.read(compiled.KEPT.read_text(encoding="utf-8"))
KERNELS = Path(__file__).parents[2] / "kernels"


def test_the_table_has_every_configuration_on_every_chip_and_no_other() -> None:
    wanted = {(str(chip), each.subject, each.name) for each in compiled.CONFIGURATIONS for chip in each.chips}
    assert {row.key[:3] for row in ROWS} == wanted
    assert len({row.key for row in ROWS}) == len(ROWS)


def test_every_kernel_that_is_written_in_triton_is_among_the_configurations() -> None:
    launching = [path.parent.name for path in KERNELS.glob("*/triton.py") if re.search(r"^ +_\w+\[", path.read_text(), re.MULTILINE)]
    assert sorted(launching) == sorted(compiled.SUBJECTS)


def test_in_the_table_nothing_spills_all_fits_and_products_are_on_tensor_cores() -> None:
    assert [fault for row in ROWS for fault in compiled.faults_of(row)] == []
    assert {row.subject for row in ROWS if row.kernel.num_products} == {"attention", "grouped_gemm", "logprob"}


def test_the_document_shows_the_table() -> None:
    assert compiled.table(ROWS) in compiled.TABLE.read_text(encoding="utf-8")


def test_faults_and_differences_are_named() -> None:
    row = next(row for row in ROWS if row.key[:3] == ("90", "logprob", "bf16") and row.kernel.name == "_stats_kernel")
    assert compiled.faults_of(row) == compiled.differences(row, row) == []
    changes = {
        "spills: 8 bytes of stack, 3 accesses": {"stack_bytes": 8, "opcodes": row.kernel.opcodes | {"LDL": 3}},
        "240000 bytes of shared memory, of 232448": {"shared_bytes": 240_000},
        "1 products of 16-bit numbers and no HGMMA": {"opcodes": row.kernel.opcodes | {"HGMMA": 0}},
    }
    for fault, change in changes.items():
        changed = replace(row, kernel=replace(row.kernel, **change))
        assert compiled.faults_of(changed) == [f"90 / logprob / bf16 / _stats_kernel: {fault}"]
        assert len(compiled.differences(changed, row)) == 1
    fewer = replace(row, kernel=replace(row.kernel, registers=row.kernel.registers - compiled.REGISTER_SLACK - 1))
    assert compiled.differences(fewer, row) == []
    assert f"registers, {fewer.kernel.registers} in the table" in compiled.differences(row, fewer)[0]
    assert compiled.differences(row, replace(fewer, triton="3.6.0")) == []
    assert "not in the table" in compiled.differences(row, None)[0]


def _compile(*args: str) -> None:
    """In a process without the interpreter."""
    command = [sys.executable, "-m", "tests.kernels.compiled", *args]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=KERNELS.parent, env=environment, timeout=1100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
@pytest.mark.skipif(HAS_GPU, reason="the kernels are run instead")
@pytest.mark.parametrize("products", [True, False], ids=["with products", "without"])
def test_compiled_again_for_hopper_kernels_are_what_the_table_says(products: bool) -> None:
    with_products = {row.subject for row in ROWS if row.kernel.num_products}
    _compile("--quick", "--chip", "90", "--subject", *(name for name in compiled.SUBJECTS if (name in with_products) == products))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(HAS_GPU, reason="the kernels are run instead")
@pytest.mark.parametrize("subject", compiled.SUBJECTS)
@pytest.mark.parametrize("chip", compiled.CHIPS, ids=str)
def test_every_configuration_compiled_again_is_what_the_table_says(chip: compiled.Chip, subject: str) -> None:
    if all(chip not in each.chips for each in compiled.CONFIGURATIONS if each.subject == subject):
        pytest.skip(f"no configuration of {subject} is for {chip}")
    _compile("--chip", str(chip), "--subject", subject)
