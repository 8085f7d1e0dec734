"""The contrastive loss of one global batch: what each rank computes of it.

A rank scores its own queries against the documents of all ranks. Its share of the loss is a sum over its queries,
divided by the number of queries in the **global** batch; one reduce-scatter sums the documents' gradients over the
ranks. So a representation's gradient is that of the global loss, whichever rank embeds which text.
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
    """The queries or the documents of a batch: which of them this rank embeds, and their places after the gather.

    Args:
        texts: their numbers among the batch's texts.
        members: each rank's texts, in the order in which it embeds them.
        ranks: this process among its peers.
    """

    def __init__(self, texts: range, members: list[list[int]], ranks: Ranks) -> None:
        self.device = ranks.device
        self.numbers = [text - texts.start for text in members[ranks.rank] if text in texts]
        """This rank's, counted from 0 on this side."""
        local = [text in texts for text in members[ranks.rank]]
        self.local_mask = torch.tensor(local, dtype=torch.bool, device=self.device)
        self.counts = [sum(text in texts for text in of_rank) for of_rank in members]
        gathered = [text for of_rank in members for text in of_rank if text in texts]
        self.places = {text - texts.start: place for place, text in enumerate(gathered)}

    def columns(self, numbers: list[tuple[int, ...]]) -> Tensor:
        """``[rows, longest]`` int64: the places of these texts after the gather, padded with -1."""
        return padded([tuple(self.places[number] for number in row) for row in numbers]).to(self.device)


class Scored(NamedTuple):
    """A batch's gathered representations, and the loss of this rank's queries."""

    queries: Tensor
    """``[queries of this rank, d]`` float32."""

    documents: Tensor
    """``[documents of the batch, d]`` float32, in gather order."""

    all_queries: Tensor | None
    """``[queries of the batch, d]`` float32, for the symmetric loss; else None."""

    positives: Tensor
    """``[queries of this rank, p]`` int64: the rows of `documents` that answer each, the scored one first; -1 pads."""

    found: InfoNCE
    """The loss from queries to documents, and what was counted with it."""

    loss: Tensor
    """Scalar float32: the sum over this rank's queries; the mean of both directions if the loss is symmetric."""


class BatchLoss(NamedTuple):
    """What the loss of a batch comes to."""

    gradient: Tensor
    """``[texts of this rank, d]`` float32: of the step's loss, for this rank's representations."""

    temperature_gradient: Tensor | None
    """This rank's share of the temperature's gradient; None if it is not learned."""

    measured: dict[str, float]
    """Loss, accuracy and what else is logged; the same on every rank."""


def temperature_of(logarithm: Tensor) -> Tensor:
    """The temperature from its learned logarithm, detached."""
    return logarithm.detach().exp().clamp(min=MIN_TEMPERATURE)


def check_agreement(digests: list[int], ranks: Ranks, what: str = "the global batch") -> None:
    """Raises TrainingError if the digests differ between ranks. Every rank passes the same number of them."""
    found = largest([*digests, *(-digest for digest in digests)], ranks)
    if found != [*digests, *(-digest for digest in digests)]:
        raise TrainingError(
            f"represent: the ranks disagree on {what}; rank {ranks.rank} of {ranks.world_size} has {digests}, the "
            f"largest is {found[: len(digests)]}. Give every node the same files, config and versions."
        )


class Contrast:
    """Computes the loss of one batch from this rank's representations.

    Args:
        batch: the **global** batch.
        members: each rank's texts by their numbers among `batch.texts`, in the order in which it embeds them.
        settings: margin, directions and prefixes.
        exchange: sends every rank's representations to every rank.
        weight: of this batch in the step's loss.
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
        self.local_texts = members[exchange.ranks.rank]
        texts = range(len(batch.texts))
        self.queries, self.documents = (
            Side(side, members, exchange.ranks) for side in (texts[: len(batch.queries)], texts[len(batch.queries) :])
        )

    def loss(self, representations: Tensor, temperature: float | Tensor) -> BatchLoss:
        """The batch's loss, and its gradient for this rank's representations, which are in the order of its members.

        Args:
            representations: ``[members of this rank, d]`` float32.
            temperature: of the softmax; a scalar tensor if it is learned.

        Raises:
            RefusedStep: on every rank, if any rank's representation is zero or not finite.
        """
        self._refuse_unusable(representations)
        exchange = self.exchange
        if isinstance(temperature, Tensor):
            temperature = temperature.detach().requires_grad_()
        scored = self._scored(representations, temperature, differentiable=True)
        queries, documents, all_queries = scored.queries, scored.documents, scored.all_queries
        (scored.loss * (self.weight / len(self.batch.queries))).backward()  # type: ignore[no-untyped-call]

        assert queries.grad is not None and documents.grad is not None
        gradient = torch.empty_like(representations)
        gradient[self.queries.local_mask] = queries.grad
        gradient[self.documents.local_mask] = exchange.reduce(documents.grad, self.documents.counts)
        if all_queries is not None:
            assert all_queries.grad is not None
            gradient[self.queries.local_mask] += exchange.reduce(all_queries.grad, self.queries.counts)
        of_temperature = temperature.grad if isinstance(temperature, Tensor) else None
        return BatchLoss(gradient, of_temperature, self._measure(scored))

    @torch.no_grad()
    def score(self, representations: Tensor, temperature: float | Tensor) -> Scored:
        """The loss without its gradient; arguments as of `loss`. Nothing is refused: the result may be nan."""
        return self._scored(representations, temperature, differentiable=False)

    def _scored(self, representations: Tensor, temperature: float | Tensor, differentiable: bool) -> Scored:
        exchange, batch, rows = self.exchange, self.batch, self.queries.numbers
        queries = representations[self.queries.local_mask].requires_grad_(differentiable)
        documents = exchange.gather(representations[self.documents.local_mask], self.documents.counts)
        documents.requires_grad_(differentiable)
        positives = self.documents.columns([batch.positives[row] for row in rows])
        found = self._loss(queries, documents, positives, temperature)
        loss, all_queries = found.loss, None
        if self.settings.symmetric:
            all_queries = exchange.gather(queries.detach(), self.queries.counts).requires_grad_(differentiable)
            of_rows = batch.anchors
            anchors = self.queries.columns([of_rows[row] for row in rows])
            loss = 0.5 * (loss + self._loss(documents[positives[:, 0]], all_queries, anchors, temperature).loss)
        return Scored(queries, documents, all_queries, positives, found, loss)

    def _loss(self, queries: Tensor, documents: Tensor, positives: Tensor, temperature: float | Tensor) -> InfoNCE:
        prefixes, margin = self.settings.prefixes or None, self.settings.margin
        return info_nce(queries, documents, positives, temperature=temperature, margin=margin, prefixes=prefixes)

    def _refuse_unusable(self, representations: Tensor) -> None:
        ranks = self.exchange.ranks
        norms = representations.norm(dim=1)
        unusable = (~torch.isfinite(norms) | (norms == 0)).nonzero()[:, 0].tolist()
        if not largest([len(unusable)], ranks)[0]:
            return
        named = [f"{self.batch.name(self.local_texts[i])} ({float(norms[i])})" for i in unusable[:NAMED_TEXTS]]
        named = together(named, ranks)[:NAMED_TEXTS]
        count = int(total([len(unusable)], ranks)[0])
        more = f" and {count - len(named)} more" if count > len(named) else ""
        what = "representation that is" if count == 1 else "representations that are"
        raise RefusedStep(
            f"represent: found {count} {what} zero or not finite, of {', '.join(named)}{more}; expected finite vectors "
            "other than zero. Look at these texts, or lower represent.optimizer.lr."
        )

    def _measure(self, scored: Scored) -> dict[str, float]:
        """What is logged of the batch, the same on every rank: sums over the queries, in one all-reduce.

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
        measured = {
            "loss": loss_sum / count,
            "accuracy": correct / count,
            "masked_negatives": masked / (count * max(1, len(documents) - 1)),
            "alignment": 2.0 - 2.0 * near / count,
        }
        if len(some) > 1:
            measured["uniformity"] = float((-2.0 * squared[others]).exp().mean().log())
        return measured
