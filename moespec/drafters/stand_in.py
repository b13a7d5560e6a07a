"""A drafter that proposes in another's place for one request.

Owns what keeps both in step with the conversation, so that the other has its place back in the next turn.
"""

from __future__ import annotations

from torch import Tensor

from moespec.drafters.base import DraftContext, Drafter
from moespec.types import DraftTree


class StandIn:
    """`guest`, which asks for no features, proposes; `host`, whose place it takes, goes on observing."""

    def __init__(self, guest: Drafter, host: Drafter) -> None:
        assert not guest.tap_layers, "a request's drafter was checked"
        self._guest, self._host = guest, host
        self.name, self.tap_layers = guest.name, host.tap_layers

    def propose(self, context: DraftContext) -> DraftTree:
        return self._guest.propose(context)

    def observe(self, features_NF: Tensor | None) -> None:
        self._host.observe(features_NF)
        self._guest.observe(None)

    def truncate(self, length: int) -> None:
        self._host.truncate(length)
        self._guest.truncate(length)

    def fork(self) -> StandIn:
        return StandIn(self._guest.fork(), self._host.fork())
