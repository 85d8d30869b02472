"""`rxt`: run, plan, eval, chat, models, and the group `data` of `cli_data.py`.

Thin: every command is a function of a lower floor, imported when needed.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from rxt_platform.cli_data import data
from rxt_platform.errors import ConfigError, DataError, RxtError, StoppedError

if TYPE_CHECKING:
    from rxt_platform.config.run import RunConfig
    from rxt_platform.model.alpha import RxTAlpha
    from rxt_platform.model.sampling import SamplingOptions


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rxt-platform")
@click.option("-v", "--verbose", is_flag=True, help="Show log messages of the platform's own parts.")
def rxt(verbose: bool) -> None:
    """Train Reactive Transformers: from a corpus to a measured conversation memory."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("rxt_platform").setLevel(logging.INFO if verbose else logging.WARNING)


@rxt.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def run(config: str, overrides: tuple[str, ...]) -> None:
    """Run CONFIG: everything that is not finished yet, then the report."""
    from rxt_platform.orchestration.runner import run_pipeline

    run_pipeline(_load(config, overrides))


@rxt.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def plan(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a run of CONFIG would do: each step cached, resumed or run, and why. Starts nothing."""
    from rxt_platform.orchestration.commands import plan_rows

    rows = plan_rows(_load(config, overrides))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['step']:<22} {row['state']:<12} {row['why']}".rstrip())


@rxt.command("eval")
@click.argument("model")
@click.option("--data", required=True, help="JSON lines: {query, answer, interactions: [{query, answer}, ...]}.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first conversations.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the initial memories."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def evaluate(model: str, data: str, limit: int | None, seed: int, as_json: bool) -> None:
    """Measure MODEL on a conversation file: answer tokens and recall, with memory and with memory reset."""
    from dataclasses import asdict

    from rxt_platform.data.sources import read_conversations
    from rxt_platform.evaluation.conversations import evaluate_conversations
    from rxt_platform.evaluation.report import render_evaluation

    talks = read_conversations(data)[:limit]
    held = _model(model)
    result = asdict(evaluate_conversations(held.model, held.own_tokenizer(), talks, seed))
    click.echo(json.dumps(result, indent=2) if as_json else render_evaluation(result))


@rxt.command()
@click.argument("model")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the likeliest tokens only.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--truncate", is_flag=True, help="Cut a message that is too long, with a warning, instead of refusing it."
)
def chat(model: str, temperature: float, top_p: float, top_k: int | None, seed: int, truncate: bool) -> None:
    """Talk to MODEL. Each answer is followed by a memory write; /reset forgets, /quit (or Ctrl-D) ends."""
    from rxt_platform.data.batches import derive_seed
    from rxt_platform.model.sampling import SamplingOptions

    held = _model(model)
    held.reset_stm_state([seed])
    click.echo(f"{held.description}\nType a message; /reset forgets, /quit ends.")
    turn = 0
    while True:
        try:
            query = input("you   > ").strip()
        except EOFError:
            click.echo()
            return
        except UnicodeDecodeError as error:
            click.echo(f"[not answered: the message is not UTF-8: {error.reason}]")
            continue
        if query == "/quit":
            return
        if query == "/reset":
            held.reset_stm_state([seed])
            turn = 0
            click.echo("memory reset")
        elif query:
            click.echo("model > ", nl=False)
            options = SamplingOptions(temperature, top_p, derive_seed(seed, turn), top_k=top_k)
            try:
                _answer(held, query, truncate, options)
                turn += 1
            except DataError as error:  # the message is too long: the conversation and its memory go on
                click.echo(f"[not answered: {error}]")


def _answer(held: "RxTAlpha", query: str, truncate: bool, how: "SamplingOptions") -> None:
    """Print an answer as it comes, then how much its memory write changed."""
    before = held.export_stm_state()
    encoded = held.tokenize_query(query, truncation=truncate)
    for token in held.interact(**encoded, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, seed=how.seed):
        click.echo(held.stringify_token(token), nl=False)
    change = float((held.memory - before).norm() / before.norm())
    click.echo(f"\n        [memory written, changed by {change:.0%}]")


@rxt.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def models(as_json: bool) -> None:
    """List the model presets with their sizes."""
    from dataclasses import asdict

    from rxt_platform.config.loading import load_preset, preset_names
    from rxt_platform.model.parameters import measure_size, render_sizes

    sizes = {name: measure_size(load_preset(name)) for name in preset_names()}
    if as_json:
        rows = [{"name": name, **asdict(size), "total": size.total.parameters} for name, size in sizes.items()]
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo(render_sizes(sizes))


rxt.add_command(data)


def _load(config: str, overrides: tuple[str, ...]) -> "RunConfig":
    from rxt_platform.config.loading import load_run

    return load_run(config, overrides)


def _model(path: str) -> "RxTAlpha":
    """A model from its directory, from the folder of the run that made it, or from the Hugging Face Hub."""
    from rxt_platform.model.alpha import RxTAlpha
    from rxt_platform.training.distributed import use_cpus

    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if not threads.isdecimal() or threads == "0":
        raise ConfigError(f"OMP_NUM_THREADS={threads!r}: must be a whole number of threads, at least 1")
    use_cpus(int(threads))
    return RxTAlpha.from_pretrained(path)


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; an RxtError becomes one line on stderr and its exit code."""
    try:
        command()
    except RxtError as error:
        told = "stopped" if isinstance(error, StoppedError) else "error"
        click.echo(f"{told}: {' '.join(str(error).splitlines())}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; a run goes on from its last checkpoint with the same command", err=True)
        return 130
    return 0


def main() -> None:
    """Entry point of the `rxt` script."""
    sys.exit(guarded(lambda: rxt(standalone_mode=False)))


if __name__ == "__main__":
    main()
