"""The conversations of a stage that holds them: texts for the rewards, ids for the model, and where they came from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from rxt_platform.data.batches import Batch
from rxt_platform.data.corpus import read_rows
from rxt_platform.data.examples import Example, ExampleSet, RowEncoder, Selected
from rxt_platform.data.rows import Conversation, RowError
from rxt_platform.data.story_world import Split
from rxt_platform.errors import DataError
from rxt_platform.rl.episodes import Episode

_AT_ONCE = 1000


def with_follow_ups(rows: ExampleSet, steps: int, sources: Sequence[int] | None = None) -> ExampleSet:
    """The same conversations of token shards as `EpisodeSet.read` finds in their corpus, as ids alone."""
    _, starts = rows.turn_lengths
    kept = np.array([len(rows[at].turns) - rows[at].opening > 1 for at in range(len(starts) - 1)], dtype=bool)
    if sources is not None:
        kept &= np.isin(rows.sources, list(sources))
    return Selected(rows, np.flatnonzero(kept), steps + 1)


class EpisodeSet(ExampleSet):
    """Conversations with at least one follow-up, each cut to `steps` of them."""

    def __init__(
        self,
        talks: Sequence[Conversation],
        examples: Sequence[Example],
        places: Sequence[str],
        steps: int,
        sources: Sequence[int] = (),
    ) -> None:
        super().__init__(examples)
        self.talks, self.places, self.steps = talks, places, steps
        self._sources = np.array(sources or [0] * len(talks), dtype=np.int16)

    @classmethod
    def read(
        cls, corpus: Path, split: Split, encoder: RowEncoder, steps: int, sources: Sequence[int] | None = None
    ) -> Self:
        """Of a corpus, all conversations or those of some sources. Raises DataError when there are none."""
        talks, examples, places, numbers = list[Conversation](), list[Example](), list[str](), list[int]()
        waiting: list[tuple[Conversation, str, int]] = []

        def encode() -> None:
            encoded = encoder.encode([talk for talk, *_ in waiting])
            for (talk, place, source), made in zip(waiting, encoded, strict=True):
                if not isinstance(made, RowError):  # the policy for those was carried out when shards were made
                    talks.append(talk)
                    examples.append(made[0].first_turns(steps + 1))
                    places.append(place)
                    numbers.append(source)
            waiting.clear()

        for one in read_rows(corpus, "conversations", split):
            assert isinstance(one.row, Conversation)
            if len(one.row.interactions) < 2 or (sources is not None and one.source not in sources):
                continue
            waiting.append((one.row, f"{one.file}:{one.number}", one.source))
            if len(waiting) == _AT_ONCE:
                encode()
        encode()
        if not talks:
            of = "" if sources is None else f" of sources {list(sources)}"
            raise DataError(f"no {split} conversation{of} has a follow-up to be answered")
        return cls(talks, examples, places, steps, numbers)

    @property
    def sources(self) -> np.ndarray:
        """See `ExampleSet`."""
        return self._sources

    def place(self, index: int) -> str:
        """Where a conversation came from."""
        return self.places[index]

    def episodes(self, batch: Batch, carried: Sequence[int | None] = ()) -> list[Episode]:
        """The conversations of a batch as episodes with its seeds; `carried` is, for each, another conversation that
        was written into its memory before."""
        made = []
        before = carried or [None] * len(batch.rows)
        for row, seed, other in zip(batch.rows.tolist(), batch.seeds.tolist(), before, strict=True):
            episode = Episode.of(self.talks[row], self[row], seed, row, self.steps)
            made.append(episode if other is None else episode.after(self[other]))
        return made

    def carried(self, batch: Batch, probability: float) -> list[int | None]:
        """For each row of a batch another conversation with that probability, by the row's seed."""
        chosen: list[int | None] = []
        for seed in batch.seeds.tolist():
            generator = np.random.default_rng([seed, 4])
            chosen.append(int(generator.integers(len(self))) if generator.random() < probability else None)
        return chosen
