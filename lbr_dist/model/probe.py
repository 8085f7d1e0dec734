"""Whether a base would be trained and encoded rightly, found out by trying it on a small copy with random weights.

A family is right if, on a copy of its config with a few narrow layers:

- every layer mixes tokens through our attention alone, which understands all that the layer asks of it;
- with the bottleneck's keys and values held, a target doesn't move when its text changes;
- a text's vector doesn't move when its neighbours in the packed row change, and is the one transformers gives;
- stage 1's loss on untouched weights is the one transformers gives;
- each weight takes part in every token: a mixture of experts needs a router's loss that we don't have.

No family is known by its name here, and no weights are read. It takes about a second on a CPU.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

from lbr_dist.data.packing import PackedRow, TrainingSequence, pack_row
from lbr_dist.errors import ModelError
from lbr_dist.kernels.layout import BOTTLENECK, TARGET
from lbr_dist.model.backbone import WeightFiles, attend, build_backbone, match_weights, read_json
from lbr_dist.model.bottleneck import LBRModel, LossWeights
from lbr_dist.model.small_copy import VOCABULARY, Unsupported, build, first_line, layers_needed, layers_of, reference

PROBE_ATTENTION = "lbr_probe"

BOTTLENECK_TOKENS = 4
TOLERANCE = 2e-4
"""Relative to the largest element. Rounding in float32 was below 1e-5 in all families, and a fault is far above."""


@dataclass
class _Tap:
    """Our attention, with a note of who called it, and with the bottleneck's keys and values recorded or put back."""

    at_bottleneck: Tensor | None = None
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    put_back: Iterator[tuple[Tensor, Tensor]] | None = None
    callers: set[nn.Module] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        self.callers.add(module)
        self.widths.add(query.shape[-1])
        if self.put_back is not None:
            key, value = key.clone(), value.clone()
            key[:, :, self.at_bottleneck], value[:, :, self.at_bottleneck] = next(self.put_back)
        elif self.at_bottleneck is not None:
            self.held.append((key[:, :, self.at_bottleneck], value[:, :, self.at_bottleneck]))
        return attend(module, query, key, value, attention_mask, **options)


def _far(found: Tensor, expected: Tensor) -> float | None:
    """The largest difference relative to the largest element, if that is more than rounding."""
    far = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    return None if far < TOLERANCE else far


class _Trial:
    """A small copy of a family twice: as we run it, and as transformers does."""

    def __init__(self, config: Any, layers: int) -> None:
        small, self.reference = reference(config, layers)
        self.tap = _Tap()
        AttentionInterface.register(PROBE_ATTENTION, self.tap)
        AttentionMaskInterface.register(PROBE_ATTENTION, lambda *args, **kwargs: None)
        backbone = build(small, PROBE_ATTENTION)
        backbone.load_state_dict(self.reference.state_dict())
        if not isinstance(backbone.get_output_embeddings(), nn.Linear):
            raise Unsupported("it has no LM head that is one linear layer")
        table = backbone.get_input_embeddings().weight
        self.special = tuple(range(10, 10 + BOTTLENECK_TOKENS))
        self.model = LBRModel(backbone, table[list(self.special)].detach().clone(), 1.0).eval()
        generator = torch.Generator().manual_seed(1)
        draw = lambda n: tuple(torch.randint(3, min(VOCABULARY, len(table)), (n,), generator=generator).tolist())  # noqa: E731
        k = BOTTLENECK_TOKENS
        self.texts = [TrainingSequence(draw(n), k, draw(m)) for n, m in ((29, 11), (3, 4), (17, 11))]
        self.others = [TrainingSequence(draw(len(s.context)), k, s.target) for s in self.texts]

    def _hidden(self, sequences: list[TrainingSequence]) -> tuple[PackedRow, Tensor]:
        row = pack_row(sequences, 0)
        with torch.no_grad():
            return row, self.model.hidden(row)

    def run(self) -> None:
        """Raises Unsupported for the first thing that is wrong."""
        try:
            row, _ = self._hidden(self.texts)
        except ModelError as error:
            raise Unsupported(str(error)) from None
        except Exception as error:
            raise Unsupported(f"it can't run with our attention ({first_line(error)})") from None
        if len(self.tap.widths) > 1:
            raise Unsupported(f"its layers have heads of different widths, {sorted(self.tap.widths)}")
        self._experts()
        self._leaks(row)
        self._neighbours()
        self._vectors()
        self._loss()

    def _experts(self) -> None:
        """A weight is a stack of experts if one token gives a gradient to some of its slices alone."""
        self.model.zero_grad()
        self.model.hidden(pack_row([TrainingSequence((), 0)], 0)).square().sum().backward()
        for name, parameter in self.model.backbone.named_parameters():
            if parameter.ndim == 3 and parameter.grad is not None:
                used = parameter.grad.flatten(1).abs().amax(1) > 0
                if bool(used.any()) and not bool(used.all()):
                    raise Unsupported(
                        f"it is a mixture of experts ({name}: a token reaches {int(used.sum())} of {len(used)}), and "
                        "there is no loss here that keeps its router balanced"
                    )
        self.model.zero_grad()

    def _elsewhere(self) -> str:
        """What mixes tokens by other means than our attention, in words."""
        layers = layers_of(self.model.backbone)
        tables = []
        for sequences in (self.texts, self.texts[1:2]):
            self._hidden(sequences)
            tables.append({name: buffer.clone() for name, buffer in self.model.backbone.named_buffers()})
        moved = [name for name in tables[0] if name in tables[1] and not torch.equal(tables[0][name], tables[1][name])]
        if moved:
            return f"{moved[0]} changes with the longest sequence of the row"
        silent = [i for i, layer in enumerate(layers) if not self.tap.callers & set(layer.modules())]
        if not silent:
            return "its layers pass something between tokens beside the attention"
        parts = [
            f"{name} ({type(child).__name__})"
            for name, child in layers[silent[0]].named_children()
            if any(p.ndim > 1 for p in child.parameters())
        ]
        return f"some layers don't use our attention, the first is layer {silent[0]}: {', '.join(parts)}"

    def _leaks(self, row: PackedRow) -> None:
        tap = self.tap
        tap.at_bottleneck, tap.held = row.roles == BOTTLENECK, []
        _, first = self._hidden(self.texts)
        tap.put_back = iter(tap.held)
        _, second = self._hidden(self.others)
        tap.at_bottleneck = tap.put_back = None  # `_elsewhere` runs the model again, without them
        target = row.roles == TARGET
        far = _far(second[target], first[target])
        if far is not None:
            raise Unsupported(f"a target sees the text past the bottleneck; {self._elsewhere()}")

    def _neighbours(self) -> None:
        changed = [self.others[0], self.texts[1], TrainingSequence(self.others[2].context[:5], BOTTLENECK_TOKENS)]
        first, second = self._hidden(self.texts)[1], self._hidden(changed)[1]
        start, length = self.texts[0].length, self.texts[1].length
        alone = self._hidden(self.texts[1:2])[1]
        for found in (first, second):
            if _far(found[start : start + length], alone) is not None:
                raise Unsupported(f"a text's vector depends on its neighbours in the row; {self._elsewhere()}")

    def _vectors(self) -> None:
        plain = [TrainingSequence(s.context, BOTTLENECK_TOKENS) for s in self.texts]
        _, hidden = self._hidden(plain)
        start = 0
        for sequence in plain:
            ids = torch.tensor([[0, *sequence.context, *self.special]])
            with torch.no_grad():
                expected = self.reference.base_model(ids, use_cache=False)[0][0]
            far = _far(hidden[start : start + sequence.length], expected)
            if far is not None:
                raise Unsupported(f"a text's vector is not the one that transformers gives (off by {far:.1%})")
            start += sequence.length

    def _loss(self) -> None:
        text = TrainingSequence(self.texts[0].context, 0)
        with torch.no_grad():
            for model in (self.model.backbone, self.reference):
                head = model.get_output_embeddings()
                head.weight *= 8.0  # a soft cap changes large logits only
                if head.bias is not None:
                    head.bias += torch.linspace(-1.0, 1.0, len(head.bias))
            found, _ = self.model(pack_row([text], 0), task="learn", form="none", weights=LossWeights(1.0, 1.0))
            ids = torch.tensor([[0, *text.context]])
            logits = self.reference(ids, use_cache=False).logits[0]
        count = len(text.context) - 1
        expected = float(F.cross_entropy(logits[1:-1].float(), ids[0, 2:]))
        if abs(float(found) / count - expected) > TOLERANCE * max(1.0, expected):
            raise Unsupported(
                f"its LM head does more than a product: stage 1's loss would be {float(found) / count:.3f} where "
                f"transformers' own is {expected:.3f}"
            )


@contextmanager
def _aside() -> Iterator[None]:
    """Hide warnings and log messages, and restore the random state afterwards."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        logging.set_verbosity(verbosity)


@cache
def _why_not(config_file: str, folder: Path) -> str | None:
    """Why the family of a config.json isn't supported, or None if it is."""
    try:
        try_family(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except (Unsupported, ValueError) as error:
        return str(error)
    return None


def check_family(folder: Path, name: str = "model.base") -> None:
    """Refuse a base of a family that would be trained or encoded wrongly.

    Args:
        folder: a model folder.
        name: the setting that names it, for messages.

    Raises:
        ModelError: says what was found.
    """
    config = read_json(folder / "config.json")
    reason = _why_not(json.dumps(config, sort_keys=True), folder)
    if reason is not None:
        raise ModelError(
            f"{name}: {folder} is of the family {config.get('model_type')!r}, which is not supported: {reason}. "
            "Use a dense model of softmax attention alone, such as Llama, Mistral, Qwen3 or Gemma 3 (docs/bases.md)."
        )


def check_weights(folder: Path) -> None:
    """Compare the tensors in a folder's files with what its config asks for, by names and shapes.

    Raises:
        ModelError: names a tensor that is missing, of another shape, or taken by nothing.
    """
    with _aside():
        match_weights(build_backbone(folder, torch.bfloat16, torch.device("meta")), WeightFiles(folder))


def try_family(config: Any) -> None:
    """Try the family of a config on a small copy.

    Raises:
        Unsupported: says why.
    """
    with _aside():
        try:
            whole = build(config, "eager", "meta")
        except Exception as error:
            raise Unsupported(f"transformers can't build it ({first_line(error)})") from None
        _Trial(config, layers_needed(whole)).run()
