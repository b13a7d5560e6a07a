"""The batches of a run, in this process or made ahead by several: one reads 0.2 to 0.4 M tokens/s, a GPU learns more.

Owns the workers and the state from which a run goes on. Knows nothing of models; what a batch holds is `data.py`'s.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moespec.train.data import Batch, MixedStream, Renderer

PREFETCH = 4  # batches that a worker is ahead


class Feed:
    """Endless batches, each one long sequence of `num_tokens`. Workers have a share of the documents each, and turns.

    `state` is that of the batches taken, whatever was made ahead. `num_workers`: 0 makes them here, one by one.
    """

    def __init__(
        self,
        documents: list[dict],
        renderer: Renderer,
        seed: int,
        num_tokens: int,
        shares: dict[str, float] | None = None,
        num_workers: int = 0,
        pinned: bool = False,
    ) -> None:
        self._pieces = _Pieces(documents, renderer, seed, num_tokens, shares)
        self._loader = DataLoader(
            self._pieces,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=PREFETCH if num_workers else None,
            pin_memory=pinned,
        )
        self._states: list[bytes | None] = [None] * max(1, num_workers)
        self._num_taken = 0
        self._iterator: Iterator[tuple[Batch, bytes]] | None = None

    def take(self) -> Batch:
        """The next batch, [1, num_tokens + 1]: its last token is the first of the same worker's next."""
        if self._iterator is None:
            num_streams = len(self._states)
            first = self._num_taken % num_streams  # whose turn it is: the loader begins with its first worker
            self._pieces.states = self._states[first:] + self._states[:first]
            self._pieces.first = first
            self._iterator = iter(self._loader)
        batch, state = next(self._iterator)
        self._states[self._num_taken % len(self._states)] = state
        self._num_taken += 1
        return batch

    def state(self) -> dict:
        return {"num_taken": self._num_taken, "streams": list(self._states)}

    def restore(self, state: dict) -> None:
        """Go on from there. ValueError where the run had another number of workers."""
        if len(state["streams"]) != len(self._states):
            raise ValueError(f"the run had {len(state['streams'])} streams: give it as many workers to go on.")
        self._num_taken, self._states, self._iterator = state["num_taken"], list(state["streams"]), None

    @property
    def tokens(self) -> Counter:
        """Tokens read so far, by source."""
        read = (pickle.loads(state)["tokens"] for state in self._states if state is not None)
        return sum(map(Counter, read), Counter())


class _Pieces(IterableDataset):
    """What one worker makes: batches of its share of the documents, each with the state behind it."""

    def __init__(
        self, documents: list[dict], renderer: Renderer, seed: int, num_tokens: int, shares: dict[str, float] | None
    ) -> None:
        self._documents, self._renderer, self._seed = documents, renderer, seed
        self._num_tokens, self._shares = num_tokens, shares
        self.states: list[bytes | None] = []
        self.first = 0

    def __iter__(self) -> Iterator[tuple[Batch, bytes]]:
        worker = get_worker_info()
        turn, num_streams = (0, 1) if worker is None else (worker.id, worker.num_workers)
        number = (self.first + turn) % num_streams
        # Seeds apart from those of other runs, which are this one's plus the tokens that it has seen.
        seed = self._seed if num_streams == 1 else self._seed * 1_000 + number
        stream = MixedStream(self._documents[number::num_streams], self._renderer, seed, self._shares)
        state = self.states[turn]
        if state is not None:
            stream.restore(pickle.loads(state))
        while True:
            batch = stream.batch(1, self._num_tokens)
            # As bytes: the loader would look for tensors in every list of it.
            yield batch, pickle.dumps(stream.state())
