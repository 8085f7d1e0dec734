"""The contrastive loss of one global batch, as one rank computes its share of it.

Each rank scores its own queries against the documents of all ranks. Its share of the loss is a sum over its queries,
divided by the queries of the **global** batch; the gradients for the documents are summed over the ranks by one
reduce-scatter. So the gradient of a representation is that of the global loss, however the texts are shared out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lbr_dist.config import RepresentConfig
from lbr_dist.config.stages import MIN_TEMPERATURE
from lbr_dist.contrastive.exchange import Exchange
from lbr_dist.data.pairs import PairBatch, padded
from lbr_dist.errors import RefusedStep, TrainingError
from lbr_dist.kernels.infonce import InfoNCE, info_nce
from lbr_dist.ranks.group import Ranks, largest, together, total

UNIFORMITY_DOCUMENTS = 1024
NAMED_TEXTS = 5


class Side:
    """The queries or the documents of a batch: which are this rank's, and where each stands when all are gathered.

    Args:
        texts: their numbers among the batch's texts.
        members: each rank's texts, in the order in which it embeds them.
        ranks: this process among its peers.
    """

    def __init__(self, texts: range, members: list[list[int]], ranks: Ranks) -> None:
        self.device = ranks.device
        self.numbers = [text - texts.start for text in members[ranks.rank] if text in texts]
        """This rank's, counted from 0 on this side."""
        self.mine = torch.tensor([text in texts for text in members[ranks.rank]], dtype=torch.bool, device=self.device)
        self.counts = [sum(text in texts for text in of_rank) for of_rank in members]
        gathered = [text for of_rank in members for text in of_rank if text in texts]
        self.places = {text - texts.start: place for place, text in enumerate(gathered)}

    def columns(self, numbers: list[tuple[int, ...]]) -> Tensor:
        """``[rows, longest]`` int64: places of some of this side, -1 where a row has ended."""
        return padded([tuple(self.places[number] for number in row) for row in numbers]).to(self.device)


class Scored(NamedTuple):
    """A batch's representations where they meet, and what its loss is over this rank's queries."""

    queries: Tensor
    """``[queries of this rank, d]`` float32."""

    documents: Tensor
    """``[documents of the batch, d]`` float32, in the order in which they are gathered."""

    everyone: Tensor | None
    """``[queries of the batch, d]`` float32, where the documents look for them too."""

    positives: Tensor
    """``[queries of this rank, p]`` int64: rows of `documents` that answer each, the scored one first, then -1."""

    found: InfoNCE
    """Of the queries' search for their documents."""

    loss: Tensor
    """Scalar float32: the sum over this rank's queries, of both directions where the loss has both."""


def temperature_of(logarithm: Tensor) -> Tensor:
    """The temperature whose logarithm is learned, without its gradient."""
    return logarithm.detach().exp().clamp(min=MIN_TEMPERATURE)


def check_agreement(digests: list[int], ranks: Ranks, what: str = "the global batch") -> None:
    """Raises TrainingError where the ranks have different digests, which are as many on every rank."""
    found = largest([*digests, *(-digest for digest in digests)], ranks)
    if found != [*digests, *(-digest for digest in digests)]:
        raise TrainingError(
            f"represent: the ranks disagree on {what}; rank {ranks.rank} of {ranks.world_size} has {digests}, the "
            f"largest is {found[: len(digests)]}. Give every node the same files, config and versions."
        )


class Contrast:
    """The loss of a batch over this rank's representations, and what is measured with it.

    Args:
        batch: the **global** batch.
        members: each rank's texts by their numbers among `batch.texts`, in the order in which it embeds them.
        settings: temperature, masks, directions and prefixes.
        exchange: brings every rank's representations to every rank.
        weight: of this batch in the step.
    """

    def __init__(
        self,
        batch: PairBatch,
        members: list[list[int]],
        settings: RepresentConfig,
        exchange: Exchange,
        weight: float = 1.0,
    ) -> None:
        self.batch, self.settings, self.exchange, self.weight = batch, settings, exchange, weight
        self.mine = members[exchange.ranks.rank]
        texts = range(len(batch.texts))
        self.queries, self.documents = (
            Side(side, members, exchange.ranks) for side in (texts[: len(batch.queries)], texts[len(batch.queries) :])
        )
        self.temperature: float | Tensor = settings.temperature
        """A tensor where it is learned; then `temperature_gradient` is this rank's share of its gradient."""
        self.temperature_gradient = torch.zeros(())
        self.measured: dict[str, float] = {}

    def build_cache(self, representations: Tensor) -> Tensor:
        """The gradient of the step's loss for this rank's representations, which are in the order of its members.

        Args:
            representations: ``[members of this rank, d]`` float32.

        Returns:
            Of the same shape.

        Raises:
            RefusedStep: on every rank, where one rank's representation is not finite or of no length.
        """
        self._refuse_unusable(representations)
        exchange, temperature = self.exchange, self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.detach().requires_grad_()
        scored = self._scored(representations, temperature, differentiable=True)
        queries, documents, everyone = scored.queries, scored.documents, scored.everyone
        (scored.loss * (self.weight / len(self.batch.queries))).backward()  # type: ignore[no-untyped-call]

        assert queries.grad is not None and documents.grad is not None
        gradient = torch.empty_like(representations)
        gradient[self.queries.mine] = queries.grad
        gradient[self.documents.mine] = exchange.reduce(documents.grad, self.documents.counts)
        if everyone is not None:
            assert everyone.grad is not None
            gradient[self.queries.mine] += exchange.reduce(everyone.grad, self.queries.counts)
        if isinstance(temperature, Tensor):
            assert temperature.grad is not None
            self.temperature_gradient = temperature.grad
        self._measure(scored)
        return gradient

    @torch.no_grad()
    def score(self, representations: Tensor) -> Scored:
        """The loss alone, without a gradient; arguments as of `build_cache`. Nothing is refused: it may be nan."""
        return self._scored(representations, self.temperature, differentiable=False)

    def _scored(self, representations: Tensor, temperature: float | Tensor, differentiable: bool) -> Scored:
        exchange, batch, rows = self.exchange, self.batch, self.queries.numbers
        queries = representations[self.queries.mine].requires_grad_(differentiable)
        documents = exchange.gather(representations[self.documents.mine], self.documents.counts)
        documents.requires_grad_(differentiable)
        positives = self.documents.columns([batch.positives[row] for row in rows])
        found = self._loss(queries, documents, positives, temperature)
        loss, everyone = found.loss, None
        if self.settings.symmetric:
            everyone = exchange.gather(queries.detach(), self.queries.counts).requires_grad_(differentiable)
            of_rows = batch.anchors
            anchors = self.queries.columns([of_rows[row] for row in rows])
            loss = 0.5 * (loss + self._loss(documents[positives[:, 0]], everyone, anchors, temperature).loss)
        return Scored(queries, documents, everyone, positives, found, loss)

    def _loss(self, queries: Tensor, documents: Tensor, positives: Tensor, temperature: float | Tensor) -> InfoNCE:
        prefixes, margin = self.settings.prefixes or None, self.settings.margin
        return info_nce(queries, documents, positives, temperature=temperature, margin=margin, prefixes=prefixes)

    def _refuse_unusable(self, representations: Tensor) -> None:
        ranks = self.exchange.ranks
        norms = representations.norm(dim=1)
        unusable = (~torch.isfinite(norms) | (norms == 0)).nonzero()[:, 0].tolist()
        if not largest([len(unusable)], ranks)[0]:
            return
        named = [f"{self.batch.name(self.mine[i])} ({float(norms[i])})" for i in unusable[:NAMED_TEXTS]]
        named = together(named, ranks)[:NAMED_TEXTS]
        count = int(total([len(unusable)], ranks)[0])
        more = f" and {count - len(named)} more" if count > len(named) else ""
        raise RefusedStep(
            f"represent: found {count} representation{'s' if count > 1 else ''} whose length is zero or not finite, of "
            f"{', '.join(named)}{more}; expected finite vectors. Look at these texts, or lower represent.optimizer.lr."
        )

    def _measure(self, scored: Scored) -> None:
        """The batch's figures, the same on every rank: sums over the queries, in one all-reduce.

        Alignment is the mean squared distance of a query and its document, uniformity the logarithm of the mean
        Gaussian potential of two documents, on at most `UNIFORMITY_DOCUMENTS` of them; both on the unit sphere.
        Source: Wang and Isola 2020 (arXiv 2005.10242), section 4.
        """
        count, found, positives = len(self.batch.queries), scored.found, scored.positives
        loss, queries, documents = (x.detach() for x in (scored.loss, scored.queries, scored.documents))
        nearness = F.cosine_similarity(queries, documents[positives[:, 0]], dim=1).sum()
        sums = torch.stack([x.double() for x in (loss, found.correct, found.masked, nearness)]).tolist()
        loss_sum, correct, masked, near = total(sums, self.exchange.ranks)
        some = F.normalize(documents[:: -(-len(documents) // UNIFORMITY_DOCUMENTS)], dim=1)
        squared = (2.0 - 2.0 * (some @ some.T)).clamp(min=0.0)
        others = ~torch.eye(len(some), dtype=torch.bool, device=some.device)
        self.measured = {
            "loss": loss_sum / count,
            "accuracy": correct / count,
            "masked_negatives": masked / (count * max(1, len(documents) - 1)),
            "alignment": 2.0 - 2.0 * near / count,
        }
        if len(some) > 1:
            self.measured["uniformity"] = float((-2.0 * squared[others]).exp().mean().log())
