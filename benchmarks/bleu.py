"""How fast is our sentence BLEU, and is it NLTK's? Against NLTK's and sacreBLEU's sentence scores, in one run.

    python benchmarks/bleu.py                     # 64 rows of 1,024 tokens, then 1,024 rows of 24
    python benchmarks/bleu.py --shape 256x1024

ours       `rxt_platform.rl.bleu.sentence_bleu`, all rows at once, on token ids
nltk       `nltk.translate.bleu_score.sentence_bleu` with smoothing method 4, row by row, on token ids
sacrebleu  `sacrebleu.metrics.BLEU.sentence_score` (0 to 100, here / 100), row by row, on the ids as words of a text,
           `tokenize="none"`, effective order off, without smoothing: it has no method 4. So it is compared on rows that
           have matches of every order, where no smoothing does anything

BLEU-4. A candidate is its reference with a share of the tokens drawn anew and 0 to 10 % of the end left off. Exits
with 1 when scores differ.
"""

import logging
import random
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from nltk.translate import bleu_score
from sacrebleu.metrics.bleu import BLEU
from timing import Machine, interleaved, machine_options, ratio, report, spread

from rxt_platform.rl.bleu import sentence_bleu

WEIGHTS = (0.25, 0.25, 0.25, 0.25)
TOLERANCE = 1e-12  # of scores from 0 to 1
Rows = list[list[int]]


def random_rows(rows: int, length: int, vocabulary: int, changed: float, seed: int) -> tuple[Rows, Rows]:
    """Candidates and references."""
    rng = random.Random(seed)
    references = [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(rows)]
    candidates = []
    for row in references:
        said = [rng.randrange(vocabulary) if rng.random() < changed else token for token in row]
        candidates.append(said[: length - rng.randint(0, length // 10)])
    return candidates, references


def nltk_scores(candidates: Rows, references: Rows) -> np.ndarray:
    """Row by row, with smoothing method 4."""
    smoothing = bleu_score.SmoothingFunction().method4
    pairs = zip(candidates, references, strict=True)
    return np.array([float(bleu_score.sentence_bleu([one], said, WEIGHTS, smoothing)) for said, one in pairs])


def sacrebleu_scores(metric: BLEU, candidates: list[str], references: list[str]) -> np.ndarray:
    """Row by row, 0 to 1."""
    pairs = zip(candidates, references, strict=True)
    return np.array([metric.sentence_score(said, [one]).score / 100 for said, one in pairs])


def compare(machine: Machine, candidates: Rows, references: Rows, repeats: int) -> dict[str, Any]:
    """Largest differences, milliseconds of the arms, and ratios of ours to theirs."""
    texts = [[" ".join(map(str, row)) for row in part] for part in (candidates, references)]
    metric = BLEU(smooth_method="none", tokenize="none", effective_order=False)
    ours, nltk = sentence_bleu(candidates, references, WEIGHTS), nltk_scores(candidates, references)
    sacre = sacrebleu_scores(metric, *texts)
    comparable = sacre > 0  # without smoothing, a row that lacks matches of some order is worth 0
    arms = {
        "ours": lambda: sentence_bleu(candidates, references, WEIGHTS),
        "nltk": lambda: nltk_scores(candidates, references),
        "sacrebleu": lambda: sacrebleu_scores(metric, *texts),
    }
    found = interleaved(arms, repeats, machine)
    milliseconds = {name: [1e3 * value for value in seconds] for name, seconds in found.items()}
    return {
        "mean_bleu": float(ours.mean()),
        "nltk_difference": float(np.abs(ours - nltk).max()),
        "sacrebleu_difference": float(np.abs(ours - sacre)[comparable].max(initial=0.0)),
        "sacrebleu_rows": int(comparable.sum()),
        "milliseconds": {name: spread(values) for name, values in milliseconds.items()},
        "nltk_to_ours": ratio(milliseconds["nltk"], milliseconds["ours"]),
        "sacrebleu_to_ours": ratio(milliseconds["sacrebleu"], milliseconds["ours"]),
    }


@click.command()
@machine_options
@click.option(
    "--shape", "shapes", multiple=True, default=["64x1024", "1024x24"], show_default=True, help="rows x tokens"
)
@click.option("--vocabulary", default=1000, show_default=True)
@click.option("--changed", default=0.3, show_default=True, help="share of the reference's tokens that is drawn anew")
@click.option("--repeats", default=7, show_default=True)
def main(
    machine: Machine,
    seed: int,
    json_file: Path | None,
    shapes: tuple[str, ...],
    vocabulary: int,
    changed: float,
    repeats: int,
) -> None:
    """Compare sentence BLEU with NLTK's and sacreBLEU's: equality and speed."""
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it advises `effective_order` at every call
    results = {}
    for shape in shapes:
        rows, length = map(int, shape.split("x"))
        found = compare(machine, *random_rows(rows, length, vocabulary, changed, seed), repeats)
        results[shape] = found
        print(f"\n{rows} rows of {length} tokens, vocabulary {vocabulary}; mean BLEU-4 {found['mean_bleu']:.3f}")
        print(f"largest difference from NLTK (method 4): {found['nltk_difference']:.1e}, all rows")
        print(f"from sacreBLEU: {found['sacrebleu_difference']:.1e}, {found['sacrebleu_rows']} comparable rows")
        print(f"{'arm':<10}{'ms':>10}{'low':>10}{'high':>10}{'arm/ours':>10}")
        for name, values in found["milliseconds"].items():
            times = found.get(f"{name}_to_ours", 1.0)
            print(f"{name:<10}{values['median']:>10.2f}{values['low']:>10.2f}{values['high']:>10.2f}{times:>10.1f}")
        if not max(found["nltk_difference"], found["sacrebleu_difference"]) <= TOLERANCE:
            print(f"scores differ by more than {TOLERANCE:.0e}")
            sys.exit(1)
    settings = {"seed": seed, "vocabulary": vocabulary, "changed": changed, "repeats": repeats, "weights": WEIGHTS}
    report("bleu", machine, settings, results, json_file)


if __name__ == "__main__":
    main()
