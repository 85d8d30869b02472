"""`rxt`: run, plan, eval, chat, models, and the groups of the other `cli_*.py`.

Thin: every command is a function of a lower floor, imported when needed.
"""

import io
import json
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from rxt_platform.cli_artifacts import artifacts
from rxt_platform.cli_data import data
from rxt_platform.cli_eval import evaluate, use_threads
from rxt_platform.cli_serve import serve
from rxt_platform.errors import DataError, RxtError, StoppedError

if TYPE_CHECKING:
    from rxt_platform.config.run import RunConfig
    from rxt_platform.model.alpha import RxTAlpha
    from rxt_platform.model.generation import ThinkingMode
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
@click.option("--json", "as_json", is_flag=True, help="The whole config, presets and defaults filled in.")
def validate(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check CONFIG, every key and value, without reading its data (`rxt data validate` does that)."""
    found = _load(config, overrides)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
        return
    click.echo(f"valid: {found.name}: {', '.join(f'{name} ({one.kind})' for name, one in found.stages.items())}")


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


@rxt.command()
@click.argument("model")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the likeliest tokens only.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--truncate", is_flag=True, help="Cut a message that is too long, with a warning, instead of refusing it."
)
@click.option(
    "--thinking",
    type=click.Choice(["fast", "extended", "auto"]),
    default="fast",
    show_default=True,
    help="Of a hybrid model: answer at once, think first, or as it sees fit.",
)
@click.option("--system", metavar="TEXT", help="A system prompt, written into the memory at the start and at /reset.")
def chat(
    model: str,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int,
    truncate: bool,
    thinking: "ThinkingMode",
    system: str | None,
) -> None:
    """Talk to MODEL. Each answer is followed by a memory write; /reset forgets, /quit (or Ctrl-D) ends.

    What follows "/tool " is a tool's result, in place of a message.
    """
    from rxt_platform.data.batches import derive_seed
    from rxt_platform.model.sampling import SamplingOptions

    if isinstance(
        sys.stdin, io.TextIOWrapper
    ):  # a byte that is no UTF-8 spoils its own message, not all that was piped
        sys.stdin.reconfigure(errors="surrogateescape")
    held = _model(model)
    _start_afresh(held, seed, system)
    click.echo(f"{held.description}\nType a message; /tool TEXT is a tool's result, /reset forgets, /quit ends.")
    turn = 0
    while True:
        try:
            message = input("you   > ").strip()
        except EOFError:
            click.echo()
            return
        if message == "/quit":
            return
        if message == "/reset":
            _start_afresh(held, seed, system)
            turn = 0
            click.echo("memory reset")
        elif message.startswith("/") and len(message.split()) == 1 and message != "/tool":
            click.echo(f"[no such command: {message}; there are /tool TEXT, /reset, /quit]")
        elif message:
            options = SamplingOptions(temperature, top_p, derive_seed(seed, turn), top_k=top_k)
            try:
                _answer(held, message, truncate, options, thinking)
                turn += 1
            except DataError as error:  # too long, say: the conversation and its memory go on
                click.echo(f"[not answered: {error}]")


def _start_afresh(held: "RxTAlpha", seed: int, system: str | None) -> None:
    """A conversation's first memory, with the system prompt in it if there is one."""
    held.reset_stm_state([seed])
    if system is not None:
        held.init_stm_state(**held.tokenize_system_prompt(system))


def _answer(held: "RxTAlpha", message: str, truncate: bool, how: "SamplingOptions", thinking: "ThinkingMode") -> None:
    """Print a reply as it comes, each of its parts on a line of its own, then how much its memory write changed."""
    before = held.export_stm_state()
    command, _, result = message.partition(" ")
    if command == "/tool":
        encoded = held.tokenize_tool_result(result.strip(), truncation=truncate)
    else:
        encoded = held.tokenize_query(message, truncation=truncate)
    labels = {"thoughts": "[thinks] ", "answer": "model > ", "tool_call": "[calls] "}
    part = None
    for token in held.interact(
        **encoded,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        seed=how.seed,
        thinking_mode=thinking,
    ):
        piece = held.read_token(token)
        if piece.part != part:
            click.echo(("" if part is None else "\n") + labels[piece.part], nl=False)
            part = piece.part
        click.echo(piece.text, nl=False)
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


rxt.add_command(evaluate)
rxt.add_command(data)
rxt.add_command(serve)
rxt.add_command(artifacts)


def _load(config: str, overrides: tuple[str, ...]) -> "RunConfig":
    from rxt_platform.config.loading import load_run

    return load_run(config, overrides)


def _model(path: str) -> "RxTAlpha":
    """A model from its directory, from the folder of the run that made it, or from the Hugging Face Hub."""
    from rxt_platform.model.alpha import RxTAlpha

    use_threads()
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
        click.echo("interrupted; if it was a run, the same command goes on from its last checkpoint", err=True)
        return 130
    return 0


def main() -> None:
    """Entry point of the `rxt` script."""
    sys.exit(guarded(lambda: rxt(standalone_mode=False)))


if __name__ == "__main__":
    main()
