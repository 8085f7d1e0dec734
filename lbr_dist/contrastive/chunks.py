"""A global batch of texts cut into evenly filled chunks: which rank runs which, and what a chunk holds."""

from __future__ import annotations

from dataclasses import dataclass

from lbr_dist.config import RunConfig, sequence_tokens
from lbr_dist.data.packing import PackedRow, TrainingSequence, assign_rows, filler, pack_row
from lbr_dist.data.pairs import PairBatch
from lbr_dist.ranks.group import Ranks


@dataclass(frozen=True, slots=True)
class Chunks:
    """How a global batch is divided: every rank knows every rank's chunks."""

    rows: list[list[list[int]]]
    """By rank and chunk, the numbers of its texts. Every rank has the same number of chunks; some may be empty."""

    tokens: list[int]
    """Tokens of each chunk, on the rank where it has the most."""

    def members(self, rank: int) -> list[int]:
        """The texts of a rank, in the order in which it embeds them."""
        return [text for row in self.rows[rank] for text in row]


def share_out(batch: PairBatch, bottleneck: int, chunk_tokens: int, separate: bool, world_size: int) -> Chunks:
    """Chunks of up to `chunk_tokens` tokens, evenly filled: a function of its arguments only."""
    lengths = [sequence_tokens(len(text), bottleneck) for text in batch.texts]
    everything = range(len(lengths))
    sides = [everything[: len(batch.queries)], everything[len(batch.queries) :]] if separate else [everything]
    rows: list[list[int]] = []
    for side in sides:
        assigned = assign_rows([lengths[text] for text in side], chunk_tokens, multiple=world_size)
        rows += [[side[i] for i in row] for row in assigned]
    tokens = [sum(lengths[text] for text in row) for row in rows]
    return Chunks(
        [rows[rank::world_size] for rank in range(world_size)],
        [max(tokens[i : i + world_size]) for i in range(0, len(tokens), world_size)],
    )


class RankChunks:
    """One rank's chunks of a global batch; every rank has the same number.

    Args:
        batch: the **global** batch.
        config: the run.
        chunk_tokens: the most tokens of a chunk.
        sink_id: the token that every sequence begins with.
        ranks: this process among its peers.
    """

    def __init__(self, batch: PairBatch, config: RunConfig, chunk_tokens: int, sink_id: int, ranks: Ranks) -> None:
        self.bottleneck, self.sink_id, self.device = config.model.bottleneck_tokens, sink_id, ranks.device
        separate, world = config.represent.separate_sides, ranks.world_size
        shared = share_out(batch, self.bottleneck, chunk_tokens, separate, world)
        self.texts, self.rows = batch.texts, shared.rows[ranks.rank]
        self.tokens = shared.tokens
        """Tokens of each chunk, on the rank where it has the most."""
        self.members = [shared.members(rank) for rank in range(world)]
        """Each rank's texts, in the order in which it embeds them."""

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> PackedRow:
        """A chunk packed into a row on this rank's device; a filler row if the chunk has no texts."""
        texts = self.rows[number]
        if not texts:
            return filler(self.bottleneck, self.sink_id).to(self.device)
        return pack_row([TrainingSequence(self.texts[i], self.bottleneck) for i in texts], self.sink_id).to(self.device)
