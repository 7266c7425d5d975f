"""The `tandem` command: one sub-command per entry point."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tandem.engine.config import RewardConfig
from tandem.engine.curate.config import CurateConfig
from tandem.engine.errors import clear_errors, fail
from tandem.engine.node_config import NodeOptions
from tandem.engine.recipes.registry import parse_launch
from tandem.engine.reward.execution import Limits


def train(recipe: tyro.conf.Positional[str], nproc: int = 1) -> None:
    """Run a recipe, or go on with the run in its folder. `tandem train RECIPE --help` explains each field of the recipe.

    Args:
        recipe: Name of the recipe; its fields follow as --field value.
        nproc: Ranks to start on this machine.
    """
    raise AssertionError("main handles train, whose options depend on the recipe")


def export(run: tyro.conf.Positional[Path], to: Path) -> None:
    """Write the newest checkpoint of a run as a Hugging Face folder (config.json, safetensors, tokenizer).

    Args:
        run: Run folder.
        to: Folder to write; must not exist.
    """
    from tandem.engine.export import export_run

    step = export_run(run, to)
    print(f"wrote {to}: the weights after {step} iterations")


def evaluate(
    model: tyro.conf.Positional[Path],
    prompts: Path,
    max_response_tokens: int = 1024,
    threads: int = 1,
    prompt_template: str = "{question}",
    use_chat_template: bool = False,
    reward: RewardConfig = RewardConfig(),  # noqa: B008  (frozen)
) -> None:
    """Greedy pass@1 and response length of a model on a prompts file.

    Args:
        model: Hugging Face folder, for example of `tandem export`.
        prompts: JSONL file with the fields question (or problem, prompt) and answer.
        max_response_tokens: Longest response, in tokens.
        threads: CPU threads of the rollout engine.
        prompt_template: Text given to the tokenizer; {question} is replaced by the prompt. A run's is its data.prompt_template.
        use_chat_template: Wrap the prompt as a user turn in the tokenizer's chat template. A run's is its data.use_chat_template.
        reward: How responses are graded, as in a run: endpoint of a judge model, sandbox, reward model.
    """
    from tandem.engine.evaluate import evaluate_model

    measured = evaluate_model(
        model,
        prompts,
        max_response_tokens=max_response_tokens,
        num_threads=threads,
        prompt_template=prompt_template,
        use_chat_template=use_chat_template,
        reward=reward,
    )
    for name, value in measured.items():
        print(f"{name}: {value:.4f}")


def report(run: tyro.conf.Positional[Path]) -> None:
    """Write RUN/report.html: one page with the plots, numbers and samples of a run, readable offline.

    Args:
        run: Run folder.
    """
    from tandem.engine.report import write_report

    print(f"wrote {write_report(run)}")


def parity(
    model: tyro.conf.Positional[str],
    layout: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    against: Literal["hf", "rollout"] | None = None,
    tolerance: float = 1e-5,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rows: int = 6,
    longest: int = 24,
    seed: int = 0,
    every: bool = False,
) -> None:
    """Where two ways to compute a model first differ: layer by layer forward, then backward with every weight's gradient.

    Ends with status 1 if they differ.

    Args:
        model: Hugging Face folder, or a tiny random model: qwen3, qwen3_moe, llama, qwen2, deepseek_v3.
        layout: How ranks divide the model, for example tp2.pp2.sp; twice, or once with --against (then 1, a single rank, if it is not
            given). Axes tp, pp, vpp, cp, ep, etp, dp; sp: sequence parallelism; full, selective: recomputation; allgather: dispatcher.
        against: Hold one layout against transformers (hf), or its log-probs against those of the embedded rollout engine (rollout).
        tolerance: Largest relative error of a tensor, and of a log-prob in nats, that is no difference.
        dtype: Of weights and activations. bfloat16 wants a tolerance of about 0.05.
        rows: Responses in the random batch.
        longest: Longest response, in tokens.
        seed: Of the batch, and of a tiny model's weights.
        every: Show every tensor, not only those around the first that differs.
    """
    from tandem.engine.parity.compare import parity as run_parity
    from tandem.engine.parity.compare import parse_layout, report

    layouts = [parse_layout(text) for text in layout or ("1",)]
    found = run_parity(model, layouts, against=against, dtype=dtype, num_rows=rows, longest=longest, seed=seed)
    first = {"hf": "transformers", "rollout": "the embedded rollout engine"}[against] if against is not None else layouts[0].text
    if not report(found, tolerance=tolerance, names=(first, layouts[-1].text), every=every):
        raise SystemExit(1)


def serve(
    model: tyro.conf.Positional[Path],
    port: int = 8000,
    host: str = "127.0.0.1",
    threads: int = 1,
    batch: int = 64,
    queue: int = 256,
    context_length: int | None = None,
    max_tokens: int = 512,
) -> None:
    """Serve a model over OpenAI's HTTP API, on the embedded engine: /v1/models, /v1/chat/completions, /v1/completions, /health.

    Args:
        model: Hugging Face folder, for example of `tandem export`; its name is the model's.
        port: Port to listen on; 0: any free one. The address is printed once requests are taken.
        host: Address to listen on. There is no authentication.
        threads: CPU threads of the engine.
        batch: Answers decoded at the same time.
        queue: Requests that may be open; more get status 429.
        context_length: Most tokens of prompt and answer; by default the model's.
        max_tokens: Longest answer to a request that names no number, in tokens.
    """
    from tandem.engine.serve import serve as run_server

    run_server(
        model,
        host,
        port,
        num_threads=threads,
        max_batch=batch,
        max_waiting=queue,
        context_length=context_length,
        max_tokens=max_tokens,
    )


def hidden_tests(
    problems: tyro.conf.Positional[Path],
    to: Path,
    url: str,
    model: str | None = None,
    key_file: Path | None = None,
    workers: int = 1,
    max_tokens: int = 4096,
    seed: int = 0,
    tests: int = 50,
    min_valid: int = 40,
) -> None:
    """Make hidden tests for programming problems with accepted solutions: a model writes a generator, the solutions agree on outputs.

    Started again with the same folder, it goes on where it was.

    Args:
        problems: JSONL file with the fields question and submissions (10 or more accepted programs); optionally id and limits.
        to: Folder for prompts.jsonl, the tests and report.json.
        url: OpenAI-compatible endpoint of the model that writes generators, up to /v1.
        model: Its name there; by default the first that the endpoint lists.
        key_file: File that holds the endpoint's API key.
        workers: Programs that run at a time.
        max_tokens: Longest reply of the model.
        seed: Of the inputs, and of the choice of 10 submissions.
        tests: Inputs for each problem.
        min_valid: Valid tests that a problem needs.
    """
    from tandem.engine.reward.chat import Endpoint, read_key
    from tandem.engine.reward.testgen import Settings
    from tandem.engine.testgen import generate_tests

    endpoint = Endpoint(url=url, model=model, api_key=read_key(key_file), max_tokens=max_tokens)
    settings = Settings(num_tests=tests, min_valid=min_valid, seed=seed)
    for name, count in generate_tests(problems, to, endpoint, settings, num_workers=workers).items():
        print(f"{name}: {count}")


def sandbox_serve(
    host: str = "127.0.0.1",
    port: int = 8600,
    workers: int | None = None,
    queue: int = 256,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
) -> None:
    """Run untrusted programs for other nodes, over HTTP: /run, /health, /metrics. docs/sandbox.md says what that stops.

    Args:
        host: Address to listen on. There is no authentication: a private network's, or a reverse proxy in front.
        port: Port to listen on.
        workers: Programs at a time; by default one for each core.
        queue: Requests that may wait; more get 429 with Retry-After.
        limits: The most that a request may ask for.
    """
    from tandem.engine.reward.bubblewrap import UnavailableError
    from tandem.engine.reward.service import serve

    try:
        serve(host, port, num_workers=workers, max_waiting=queue, limits=limits)
    except UnavailableError as error:
        fail(str(error), status=1)


def curate(config: Annotated[CurateConfig, tyro.conf.arg(name="")]) -> None:
    """Make a prompts file for `tandem train` from raw ones: exclusions with reasons, no duplicates, difficulty by a model, a report."""
    from tandem.engine.curate.curate import PROMPTS_FILE
    from tandem.engine.curate.curate import curate as run_curation

    outcome = run_curation(config)
    print(f"wrote {config.to / PROMPTS_FILE}: {len(outcome.prompts)} of {outcome.num_read} prompts")


def rollout_node(
    run: tyro.conf.Positional[Path],
    options: Annotated[NodeOptions, tyro.conf.arg(name="")] = NodeOptions(),  # noqa: B008  (frozen)
) -> None:
    """Generate for a run on a machine that has no part in its training, until it is stopped (Ctrl-C). docs/elastic.md says how.

    Args:
        run: Run folder, on a file system that both machines share; the run needs rollout.elastic.enabled.
    """
    from tandem.engine.rollout_node import run_node

    run_node(run, options)


def bench(name: tyro.conf.Positional[str]) -> None:
    """Measure kernels and swaps against their floors and peers. `tandem bench --help` lists what there is.

    Args:
        name: Benchmark; its options follow.
    """
    raise AssertionError("main handles bench, whose options depend on the benchmark")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Bad input ends with a message and status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    with clear_errors():
        if args[:1] == ["train"]:
            _train(args[1:])
            return
        if args[:1] == ["bench"]:
            from tandem.engine.bench import run_benchmarks

            raise SystemExit(run_benchmarks(args[1:]))
        tyro.extras.subcommand_cli_from_dict(
            {
                "train": train,
                "export": export,
                "evaluate": evaluate,
                "report": report,
                "parity": parity,
                "serve": serve,
                "testgen": hidden_tests,
                "sandbox-serve": sandbox_serve,
                "curate": curate,
                "rollout-node": rollout_node,
                "bench": bench,
            },
            prog="tandem",
            description="Reinforcement learning of long chain-of-thought models.",
            args=args,
            use_underscores=True,
        )


def _train(args: list[str]) -> None:
    launch = parse_launch(args)
    if launch.nproc == 1:
        from tandem.engine.train import train as run_recipe

        run_recipe(launch.config)
        return
    from tandem.engine.feasibility import check_run

    check_run(launch.config, num_ranks=launch.nproc, ranks_per_node=launch.nproc)  # sooner, and once, than every rank would
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch.nproc}"]
    command = [sys.executable, *ranks, "-m", "tandem.engine.train", *without_option(args, "--nproc")]
    os.execv(sys.executable, command)


def without_option(args: Sequence[str], option: str) -> list[str]:
    """The arguments without "--option value" and "--option=value"."""
    kept = []
    skip = False
    for arg in args:
        if skip:
            skip = False
        elif arg == option:
            skip = True
        elif not arg.startswith(option + "="):
            kept.append(arg)
    return kept


if __name__ == "__main__":
    main()
