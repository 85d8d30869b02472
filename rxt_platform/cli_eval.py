"""`rxt eval`: measure a saved model on a conversation file. Thin: every part is a function of a lower floor."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rxt_platform.errors import ConfigError

if TYPE_CHECKING:
    from rxt_platform.data.examples import TooLong
    from rxt_platform.evaluation.responders import History


@click.command("eval")
@click.argument("model")
@click.option("--data", required=True, metavar="FILE", help="Conversations: JSON lines, Parquet, CSV, or hf:NAME.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first conversations.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of all that is drawn at random."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.option("--report", metavar="FILE.html", help="Also write a page with pictures that needs no other file.")
@click.option("--history", type=click.Choice(["full", "none"]), help="What a stateless model reads.  [default: full]")
@click.option("--window", type=click.IntRange(min=9), help="Tokens of an interaction.  [default: the model's]")
@click.option(
    "--too-long",
    type=click.Choice(["truncate", "quarantine", "fail"]),
    default="truncate",
    show_default=True,
    help="What becomes of an interaction beyond the window: its end is cut, its conversation left out, or an error.",
)
@click.option("--no-free-running", is_flag=True, help="Don't also hold the conversations with the model's own answers.")
@click.option(
    "--reward-model", metavar="DIR", help="Take the reward's embedding from this model: it must stay the same."
)
def evaluate(
    model: str,
    data: str,
    limit: int | None,
    seed: int,
    as_json: bool,
    report: str | None,
    history: "History | None",
    window: int | None,
    too_long: "TooLong",
    no_free_running: bool,
    reward_model: str | None,
) -> None:
    """Measure MODEL on a conversation file, with its memory and with the memory reset.

    Answer tokens by turn, recall by distance, reward of the answers, the memory's health, latency. MODEL is a
    directory, the folder of the run that made it, or a name on the Hugging Face Hub. A stateless baseline is measured
    in the same way, with and without its history; give it the --window of the model which it is compared with, so that
    both answer the same tokens.
    """
    from rxt_platform.config.run import EvaluationConfig
    from rxt_platform.data.sources import read_conversations
    from rxt_platform.evaluation import evaluate as measuring
    from rxt_platform.evaluation.report.report import render_evaluation, to_json, write_evaluation_page
    from rxt_platform.model import files
    from rxt_platform.model.baseline import StatelessTransformer
    from rxt_platform.model.pretrained import find_or_download

    if report is not None:
        _check_page(Path(report))
    use_threads()
    talks = read_conversations(data)[:limit]
    held, tokenizer = files.load_any(find_or_download(model, [files.CONFIG, files.WEIGHTS, files.TOKENIZER]))
    if history is not None and not isinstance(held, StatelessTransformer):
        raise ConfigError("--history is for stateless models, this one has a memory: leave it out")
    settings = EvaluationConfig(free_running=not no_free_running, reward_model=reward_model)
    result = measuring.evaluate(
        held,
        tokenizer,
        talks,
        settings,
        seed,
        history or "full",
        too_long,
        window,
        progress=_Progress(len(talks)).show,
    )
    result = {"model": model, "data": data, **result}
    title = f"{Path(model).resolve().name} on {Path(data).name}"
    click.echo(to_json(result) if as_json else f"{title}, seed {seed}\n{render_evaluation(result)}")
    if report is not None:
        write_evaluation_page(Path(report), title, result)


def _check_page(path: Path) -> None:
    """Raises ConfigError for a page that could not be written in the end."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--report {path}: no such folder: make it first")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--report {path}: {'is a folder' if path.is_dir() else 'its folder is not writable'}")


def use_threads() -> None:
    """Compute on as many threads as OMP_NUM_THREADS says, on one if it says nothing."""
    from rxt_platform.training.distributed import use_cpus

    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if not threads.isdecimal() or threads == "0":
        raise ConfigError(f"OMP_NUM_THREADS={threads!r}: must be a whole number of threads, at least 1")
    use_cpus(int(threads))


class _Progress:
    """Conversations done, on a terminal."""

    def __init__(self, total: int) -> None:
        self._total = total

    def show(self, done: int) -> None:
        """Replace the line; take it away at the end."""
        if sys.stderr.isatty():
            text = f"  {done:,} of {self._total:,} conversations"
            click.echo(f"\r{text}" if done < self._total else "\r" + " " * len(text) + "\r", err=True, nl=False)
