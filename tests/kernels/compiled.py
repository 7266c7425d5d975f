"""Every Triton kernel in the configurations that its wrapper chooses, compiled for chips that are not there; the table of what came out.

    python -m tests.kernels.compiled                      compile all and compare with the table that is kept
    python -m tests.kernels.compiled --write              and keep what came out
    python -m tests.kernels.compiled --chip 90 --subject norm logprob

A new kernel is one more line of CONFIGURATIONS. Runs in a process without Triton's interpreter.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from tandem.kernels.adamw import FusedAdamW, Tensors
from tandem.kernels.attention import plan_attention
from tandem.kernels.attention.triton import attention_forward
from tandem.kernels.attention.triton_backward import attention_backward
from tandem.kernels.backend import chosen
from tandem.kernels.checksum import triton as checksum
from tandem.kernels.grouped_gemm import triton as grouped_gemm
from tandem.kernels.logprob import triton as logprob
from tandem.kernels.norm import triton as norm
from tandem.kernels.packing import CASTS, Magnitudes, Packer, Part
from tandem.kernels.permute import triton as permute
from tandem.kernels.policy_loss import triton as policy_loss
from tandem.kernels.policy_loss.inputs import VARIANTS, Responses, Tokens
from tandem.kernels.repetition import Detector, Rule
from tandem.kernels.repetition.triton import first_repetition
from tandem.kernels.rope import triton as rope
from tandem.kernels.swiglu import triton as swiglu
from tests.kernels.offline import SHARED_MEMORY_LIMIT, TENSOR_CORES, Chip, Compiled, compiling

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks/baselines/compiled.jsonl"
TABLE = ROOT / "docs/compiled.md"
# Registers a thread by which a kernel may differ from the table: what one more live value in an unrolled loop comes to.
REGISTER_SLACK = 8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Configuration:
    """Launches of real wrappers, on tensors without values."""

    subject: str
    name: str
    launch: Callable[[], object]
    quick: bool = False  # compiled by `make test`, for Hopper
    chips: tuple[Chip, ...] = tuple(TENSOR_CORES)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Any:
    return meta(*shape, dtype=torch.int32)


def _attention(width: int, value_width: int, dtype: torch.dtype, *, with_lse: bool = False) -> None:
    q, k, v = (meta(1024, n, d, dtype=dtype) for n, d in ((8, width), (2, width), (2, value_width)))
    plan = plan_attention(torch.full((1024,), 1024), device=torch.device("meta"))
    out, lse = attention_forward(q, k, v, plan, width**-0.5)
    attention_backward(torch.empty_like(out), torch.empty_like(lse) if with_lse else None, q, k, v, out, lse, plan, width**-0.5, 0)


def _logprob(width: int, dtype: torch.dtype, *, with_entropy: bool) -> None:
    tokens, vocab = logprob.BLOCK_TOKENS, logprob.BLOCK_COLUMNS
    hidden, weight = meta(tokens, width, dtype=dtype), meta(vocab, width, dtype=dtype)
    targets, row = meta(tokens, dtype=torch.int64), _row(tokens)
    logprob.logprob_forward(hidden, weight, targets, row, None)
    logprob.logprob_backward(row, row if with_entropy else None, hidden, weight, targets, row, row, row, None)


def _logprob_rows(dtype: torch.dtype) -> None:
    """Gradient in forward."""
    tokens, vocab = logprob.ROW_TOKENS, 32_000
    row, targets = _row(tokens), meta(tokens, dtype=torch.int64)
    logprob.logprob_with_gradient(meta(tokens, 4096, dtype=dtype), meta(vocab, 4096, dtype=dtype), targets, row, row, None)


def _row(length: int) -> Any:
    return meta(length, dtype=FP32)


def _loss(variant: str, *, masked: bool, weighted: bool) -> None:
    row, mask = _row(4096), meta(4096, dtype=torch.bool) if masked else None
    weights = row if weighted else None
    policy_loss.loss_and_coefficients(Tokens(row, row, _row(8), ints(9), mask, weights, variant, 0.1, 0.2, 0.2))


def _groups(baseline: str, *, normalise_std: bool) -> None:
    flags = meta(4096, dtype=torch.bool)
    policy_loss.group_statistics(Responses(_row(4096), ints(4096), flags, flags, ints(9), 0.1, baseline, 0.1, normalise_std))


def _norm(width: int, dtype: torch.dtype) -> None:
    x, weight = meta(4096, width, dtype=dtype), meta(width, dtype=dtype)
    norm.forward(x, weight, 1e-6)
    norm.backward(x, x, weight, _row(4096))


def _swiglu(width: int, dtype: torch.dtype) -> None:
    x, grad = meta(4096, 2 * width, dtype=dtype), meta(4096, width, dtype=dtype)
    swiglu.forward(x)
    swiglu.backward(grad, x)
    swiglu.weighted_forward(x, _row(4096))
    swiglu.weighted_backward(grad, x, _row(4096))


def _rope(heads: int, width: int, dtype: torch.dtype) -> None:
    angles = meta(4096, 1, width // 2, dtype=FP32)
    for back in (False, True):
        rope.rotate(meta(4096, heads, width, dtype=dtype), angles, angles, back=back)


def _permute(experts: int, most: int, width: int, dtype: torch.dtype) -> None:
    tokens, rows = 32_768, 32_768 * most
    x = meta(tokens, width, dtype=dtype)
    source, place, _ = permute.route(meta(tokens, experts, dtype=torch.bool), rows, most)
    y = permute.gather(x, source)
    for weights in (None, _row(rows)):
        permute.gather_sum(y, place, weights)
    permute.unpermute_gradients(x, y, _row(rows), source)


def _gemm(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weights, offsets = [meta(outputs, inputs, dtype=dtype) for _ in range(128)], ints(129)
    x, grad = meta(rows, inputs, dtype=dtype), meta(rows, outputs, dtype=dtype)
    grouped_gemm.forward(x, weights, offsets)
    grouped_gemm.grad_rows(grad, weights, offsets)
    grouped_gemm.grad_weights(grad, x, offsets)


def _adamw(grad_dtype: torch.dtype, *, casts: bool) -> None:
    side, (master, grad, first, second) = 4096, (meta(4096, 4096, dtype=dtype) for dtype in (FP32, grad_dtype, FP32, FP32))
    blocks = (meta(side, side, dtype=torch.float8_e4m3fn), meta(side // 128, side // 128, dtype=FP32)) if casts else ()
    with chosen("triton"):
        FusedAdamW().step(
            [Tensors(master, grad, first, second, meta(side, side), *blocks)],
            **{"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "num_steps": 1},
        )


def _repetition() -> None:
    rule = Rule(max_period=64, min_repeats=8, min_tokens=32, ngram=8, ngram_threshold=20.0)
    with chosen("triton"):
        detector = Detector(rule, 256, max_tokens=131_072, device="meta")
        detector.push(meta(256, dtype=torch.int64))
        detector.reset([3, 5], ints(70_000), ints(3))
        first_repetition(ints(1_000_000), ints(65), rule)


def _checksum() -> None:
    checksum.checksums(meta(1 << 27, dtype=torch.uint8), meta(300, 3, dtype=torch.int64), ints(1500))


def _packing(casts: Iterable[tuple[torch.dtype, torch.dtype]]) -> None:
    """Each cast of rows that are aligned and of some that are not, alone and in one bucket; to fp8 with scales that are found or given."""
    fp8, scales = torch.float8_e4m3fn, meta(64, 64, dtype=FP32)
    casts = sorted(casts, key=str)

    def both(dtype: torch.dtype) -> list[torch.Tensor]:
        return [meta(4096, 4096, dtype=dtype), meta(4096, 4097, dtype=dtype)[:, :1023]]

    def part(source: torch.Tensor, to: torch.dtype) -> Part:
        return Part(source=source, start=256, dtype=to, scale_start=1 << 30 if to == fp8 != source.dtype else None)

    parts = [part(rows, to) for dtype, to in casts for rows in both(dtype)]
    cut = [rows for dtype, to in casts if to == fp8 != dtype for rows in both(dtype)]
    parts += [Part(source=rows, start=256, dtype=fp8, given_scales=scales, row=160, column=32) for rows in cut]
    with chosen("triton"):
        for bucket in ([one] for one in parts):
            Packer(bucket).pack(meta(1 << 32, dtype=torch.uint8))
        Packer(parts).pack(meta(1 << 32, dtype=torch.uint8))
        for rows in cut:
            Magnitudes([(rows, scales, 160, 32)]).find()


CONFIGURATIONS = [
    Configuration("attention", "D=128 bf16", lambda: _attention(128, 128, BF16), quick=True),
    Configuration("attention", "D=128 bf16, gradient of the LSE", lambda: _attention(128, 128, BF16, with_lse=True)),
    Configuration("attention", "D=128 fp16", lambda: _attention(128, 128, FP16)),
    Configuration("attention", "D=192/128 bf16", lambda: _attention(192, 128, BF16)),
    *(Configuration("attention", f"D={d} bf16", lambda d=d: _attention(d, d, BF16)) for d in (16, 32, 64)),
    *(Configuration("attention", f"D={d} fp32", lambda d=d: _attention(d, d, FP32)) for d in (16, 32, 64, 128)),
    # On sm_80 its pass for dQ spills a little in every tile that was tried.
    Configuration("attention", "D=192/128 fp32", lambda: _attention(192, 128, FP32), chips=(90, "gfx942")),
    Configuration("logprob", "bf16", lambda: _logprob(4096, BF16, with_entropy=False), quick=True),
    Configuration("logprob", "bf16, gradient of the entropy", lambda: _logprob(4096, BF16, with_entropy=True)),
    Configuration("logprob", "fp16", lambda: _logprob(4096, FP16, with_entropy=True)),
    Configuration("logprob", "bf16, rows of no multiple of 16 bytes", lambda: _logprob(4092, BF16, with_entropy=True)),
    Configuration("logprob", "fp32", lambda: _logprob(4096, FP32, with_entropy=True)),
    *(Configuration("logprob", f"rows {dtype}", lambda dtype=dtype: _logprob_rows(dtype), quick=dtype == BF16) for dtype in (BF16, FP32)),
    *(
        Configuration(
            "policy_loss",
            f"{variant}{' masked' * masked}{' weighted' * weighted}",
            lambda variant=variant, masked=masked, weighted=weighted: _loss(variant, masked=masked, weighted=weighted),
            quick=masked and weighted,
        )
        for variant in VARIANTS
        for masked in (False, True)
        for weighted in (False, True)
    ),
    *(
        Configuration("policy_loss", f"{baseline}{' / std' * std}", lambda baseline=baseline, std=std: _groups(baseline, normalise_std=std))
        for baseline in ("mean", "log_mean_exp")
        for std in (False, True)
    ),
    *(Configuration("norm", f"H={h} bf16", lambda h=h: _norm(h, BF16), quick=h != 8192) for h in (128, 4096, 8192, 16_384)),
    Configuration("norm", "H=4096 fp32", lambda: _norm(4096, FP32)),
    *(Configuration("swiglu", f"{dtype}", lambda dtype=dtype: _swiglu(12_288, dtype), quick=dtype == BF16) for dtype in (BF16, FP32)),
    Configuration("swiglu", "F=768 bf16", lambda: _swiglu(768, BF16)),
    Configuration("rope", "N=32 D=128 bf16", lambda: _rope(32, 128, BF16), quick=True),
    Configuration("rope", "N=8 D=64 bf16", lambda: _rope(8, 64, BF16)),
    Configuration("rope", "N=32 D=128 fp32", lambda: _rope(32, 128, FP32)),
    Configuration("permute", "E=128 K=8 bf16", lambda: _permute(128, 8, 2048, BF16), quick=True),
    Configuration("permute", "E=8 K=2 fp32", lambda: _permute(8, 2, 4096, FP32)),
    Configuration("permute", "E=256 K=8 H=7168 bf16", lambda: _permute(256, 8, 7168, BF16)),
    Configuration("grouped_gemm", "bf16", lambda: _gemm(262_144, 2048, 1536, BF16), quick=True),
    Configuration("grouped_gemm", "bf16, few rows an expert", lambda: _gemm(4096, 2048, 1536, BF16)),
    Configuration("grouped_gemm", "bf16, narrow", lambda: _gemm(262_144, 2048, 96, BF16)),
    Configuration("grouped_gemm", "bf16, a depth off the tile", lambda: _gemm(262_144, 752, 2048, BF16)),
    Configuration("grouped_gemm", "bf16, rows of no multiple of 16", lambda: _gemm(262_144, 760, 2048, BF16)),
    Configuration("grouped_gemm", "fp16", lambda: _gemm(262_144, 2048, 1536, FP16)),
    Configuration("grouped_gemm", "fp32", lambda: _gemm(32_768, 2048, 1536, FP32)),
    Configuration("adamw", "fp32 gradient, fp8 blocks", lambda: _adamw(FP32, casts=True)),
    Configuration("adamw", "bf16 gradient", lambda: _adamw(BF16, casts=False)),
    Configuration("repetition", "256 rows", _repetition),
    Configuration("checksum", "128 MiB, 300 entries", _checksum, quick=True),
    Configuration("packing", "every cast", lambda: _packing(CASTS)),
]
SUBJECTS = list(dict.fromkeys(configuration.subject for configuration in CONFIGURATIONS))
CHIPS: tuple[Chip, ...] = tuple(TENSOR_CORES)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel of one configuration on one chip."""

    chip: Chip
    subject: str
    configuration: str
    kernel: Compiled
    triton: str = triton.__version__

    @property
    def key(self) -> tuple[str, ...]:
        return str(self.chip), self.subject, self.configuration, self.kernel.name


def compile_all(chips: Sequence[Chip], subjects: Sequence[str], *, quick: bool) -> list[Row]:
    """Rows in the order of CONFIGURATIONS. A kernel that a configuration launches several times alike is one row, else #2 and so on."""
    rows: list[Row] = []
    for chip in chips:
        for configuration in CONFIGURATIONS:
            if configuration.subject not in subjects or chip not in configuration.chips or (quick and not configuration.quick):
                continue
            with compiling(chip) as kernels:
                configuration.launch()
            for kernel in _distinct(kernels):
                rows.append(Row(chip=chip, subject=configuration.subject, configuration=configuration.name, kernel=kernel))
    return rows


def _distinct(kernels: Sequence[Compiled]) -> list[Compiled]:
    found: list[Compiled] = []
    for kernel in [kernel for i, kernel in enumerate(kernels) if kernel not in kernels[:i]]:
        number = 1 + sum(other.name.split(" #")[0] == kernel.name for other in found)
        found.append(dataclasses.replace(kernel, name=f"{kernel.name} #{number}") if number > 1 else kernel)
    return found


def faults_of(row: Row) -> list[str]:
    """What no kernel may do on its chip, whatever the table says."""
    kernel, found = row.kernel, []
    if kernel.num_spills:
        found.append(f"spills: {kernel.stack_bytes} bytes of stack, {kernel.num_spills - kernel.stack_bytes} accesses")
    if kernel.shared_bytes > SHARED_MEMORY_LIMIT[row.chip]:
        found.append(f"{kernel.shared_bytes} bytes of shared memory, of {SHARED_MEMORY_LIMIT[row.chip]}")
    if kernel.num_products and not kernel.count(TENSOR_CORES[row.chip]):
        found.append(f"{kernel.num_products} products of 16-bit numbers and no {TENSOR_CORES[row.chip]}")
    return [f"{' / '.join(row.key)}: {fault}" for fault in found]


def differences(row: Row, kept: Row | None) -> list[str]:
    """How a kernel differs from the table; registers and shared memory are compared where one compiler made both."""
    if kept is None:
        return [f"{' / '.join(row.key)}: not in the table; run python -m tests.kernels.compiled --write"]
    if row.triton != kept.triton:
        return []
    found = []
    if row.kernel.registers > kept.kernel.registers + REGISTER_SLACK:
        found.append(f"{row.kernel.registers} registers, {kept.kernel.registers} in the table")
    for name in ("shared_bytes", "num_warps", "opcodes"):
        ours, before = getattr(row.kernel, name), getattr(kept.kernel, name)
        if ours != before:
            found.append(f"{name} {ours}, {before} in the table")
    return [f"{' / '.join(row.key)}: {difference}" for difference in found]


def write(rows: Iterable[Row], path: Path = KEPT) -> None:
    lines = [json.dumps(dataclasses.asdict(row)) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(text: str) -> list[Row]:
    """Rows from JSON lines."""
    found = []
    for line in text.splitlines():
        values = json.loads(line)
        found.append(Row(**(values | {"kernel": Compiled(**values["kernel"])})))
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each kernel of each configuration, three columns for each chip."""
    head = " | ".join(f"{'sm_' * isinstance(chip, int)}{chip} registers | spills | shared | {TENSOR_CORES[chip]}" for chip in CHIPS)
    lines = [f"| kernel | configuration | {head} |", "|---|---|" + "---|" * 4 * len(CHIPS)]
    known = {row.key: row.kernel for row in rows}
    for key in dict.fromkeys(row.key[1:] for row in rows):
        cells = []
        for chip in CHIPS:
            kernel = known.get((str(chip), *key))
            filled = kernel and (kernel.registers, kernel.num_spills, kernel.shared_bytes, kernel.count(TENSOR_CORES[chip]) or "")
            cells += map(str, filled or [""] * 4)
        lines.append(f"| {key[0]} `{key[2]}` | {key[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


TEXT = """# What the compilers make of the kernels

Every Triton kernel in the configurations that its wrapper chooses, compiled without a GPU by Triton {version}. Written by
`python -m tests.kernels.compiled --write`; `tests/kernels/test_compiled.py` compiles again and compares.

Registers are per thread (of AMD's, vector registers); spills are bytes on the stack and accesses to them; shared memory is in bytes, of
{limits}; the last column of a chip counts its tensor cores' instruction, which every product of 16-bit numbers must become. Products of
fp32 are exact and use none.

{table}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for chips that are not there.")
    parser.add_argument("--chip", nargs="+", default=list(CHIPS), type=lambda text: int(text) if text.isdigit() else text, choices=CHIPS)
    parser.add_argument("--subject", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--quick", action="store_true", help="the configurations of `make test` alone")
    parser.add_argument("--write", action="store_true", help=f"keep the rows in {KEPT.relative_to(ROOT)} and {TABLE.relative_to(ROOT)}")
    args = parser.parse_args()
    rows = compile_all(args.chip, args.subject, quick=args.quick)
    kept = {row.key: row for row in read(KEPT.read_text(encoding="utf-8"))} if KEPT.exists() else {}
    found = [fault for row in rows for fault in faults_of(row)]
    if args.write:
        redone = {(str(chip), subject) for chip in args.chip for subject in args.subject}
        others = [row for key, row in kept.items() if key[:2] not in redone]
        rows = sorted(others + rows, key=lambda row: (SUBJECTS.index(row.subject), CHIPS.index(row.chip)))
        write(rows)
        limits = ", ".join(f"{limit} ({'sm_' * isinstance(chip, int)}{chip})" for chip, limit in SHARED_MEMORY_LIMIT.items())
        TABLE.write_text(TEXT.format(version=triton.__version__, limits=limits, table=table(rows)), encoding="utf-8")
    else:
        found += [difference for row in rows for difference in differences(row, kept.get(row.key))]
    print("\n".join(found) or f"{len(rows)} kernels: nothing spills, all fits, products are on tensor cores")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
