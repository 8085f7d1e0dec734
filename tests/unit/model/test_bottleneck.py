"""The model: packed rows give the same as one sequence at a time in every family; nothing leaks past the bottleneck."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lbr_dist.config import LearnConfig, ModelConfig
from lbr_dist.data.packing import PackedRow, TrainingSequence, pack_row
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.errors import ModelError
from lbr_dist.kernels.attention import bottleneck_attention
from lbr_dist.kernels.layout import BOTTLENECK, TARGET
from lbr_dist.model import backbone
from lbr_dist.model.bottleneck import LBRModel, LossWeights, Posterior, load_model
from tests import tiny
from tests.distributed import single


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LBRModel]:
    tied = request.param != "qwen2"
    folder = tiny.write_model(tmp_path_factory.mktemp("family") / request.param, request.param, tied)
    config = ModelConfig(base=str(folder), bottleneck_tokens=4, dtype="float32")
    return folder, load_model(config, folder, TextTokenizer(folder), seed=0)


def sequences(folder: Path) -> tuple[TextTokenizer, list[TrainingSequence]]:
    tokenizer = TextTokenizer(folder)
    ids = tokenizer.encode(list(tiny.texts().values())[:9])
    made = [TrainingSequence(i[: len(i) // 2], 4, i[len(i) // 2 :]) for i in ids[:6]]
    return tokenizer, [*made, *(TrainingSequence(i, 4, i, tuple(1 if t % 3 == 0 else t for t in i)) for i in ids[6:])]


def test_embeddings_match_hugging_face(family: tuple[Path, LBRModel]) -> None:
    folder, model = family
    tokenizer, _ = sequences(folder)
    texts = tokenizer.encode(list(tiny.texts().values())[:7])
    row = pack_row([TrainingSequence(t, 4) for t in texts], tokenizer.sink_id)
    found = model(row, task="embed", pooling="bottleneck_last")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embed = plain.get_input_embeddings()
    for vector, index in zip(found, row.order.tolist(), strict=True):
        x = torch.tensor([[tokenizer.sink_id, *texts[index]]])
        bottleneck = model.bottleneck * getattr(embed, "embed_scale", 1.0)
        expected = plain.model(inputs_embeds=torch.cat([embed(x), bottleneck[None]], dim=1))[0][0, -1]
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["mask", "reinject"])
def test_packed_loss_matches_one_sequence_at_a_time(family: tuple[Path, LBRModel], form: str) -> None:
    folder, model = family
    tokenizer, batch = sequences(folder)
    counts = (sum(len(s.context) - 1 for s in batch), sum(len(s.target) for s in batch))
    row = pack_row(batch, tokenizer.sink_id)
    model.zero_grad()
    weights = LossWeights(text=0.5 / counts[0], target=1.0 / counts[1])
    loss, sums = model(row, task="learn", form=form, weights=weights)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert sums[2:].tolist() == [*counts, 0]
    reference = load_model(
        ModelConfig(base=str(folder), bottleneck_tokens=4, dtype="float32"), folder, tokenizer, seed=0
    )
    expected = single.learn_loss(
        reference,
        batch,
        tokenizer.sink_id,
        LearnConfig(bottleneck=form, text_weight=0.5),  # type: ignore[arg-type]
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in single.gradients(reference, expected).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_the_target_sees_the_text_only_through_the_bottleneck(
    family: tuple[Path, LBRModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bottleneck's keys and values fixed, another text must not change the target by one bit."""
    folder, model = family
    tokenizer, batch = sequences(folder)
    other = [TrainingSequence(tuple(reversed(s.context)), s.bottleneck, s.target, s.target_inputs) for s in batch]
    rows = [pack_row(items, tokenizer.sink_id) for items in (batch, other)]
    at_bottleneck = rows[0].roles == BOTTLENECK
    held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hidden(row: PackedRow, form: str) -> torch.Tensor:
        layers = iter(held) if form == "put back" else None

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if form == "record":
                held.append((k[at_bottleneck], v[at_bottleneck]))
            elif layers is not None:
                k[at_bottleneck], v[at_bottleneck] = next(layers)
            return bottleneck_attention(q, k, v, *args, **kwargs)

        monkeypatch.setattr(backbone, "bottleneck_attention", attend)
        with torch.no_grad():
            return model.hidden(row)[row.roles == TARGET]

    first = hidden(rows[0], "record")
    assert len(held) == 2, "one pair of keys and values per layer"
    assert torch.equal(hidden(rows[1], "put back"), first)
    assert not torch.equal(hidden(rows[1], "as it is"), first), "the bottleneck carries nothing"


def test_other_sequences_in_the_row_change_nothing(family: tuple[Path, LBRModel]) -> None:
    folder, model = family
    tokenizer, batch = sequences(folder)
    alone = model.hidden(pack_row(batch[1:2], tokenizer.sink_id))
    together = model.hidden(pack_row(batch[:3], tokenizer.sink_id))
    start = batch[0].length
    torch.testing.assert_close(together[start : start + batch[1].length], alone, rtol=1e-5, atol=1e-5)


def test_the_posterior_is_a_gaussian_channel() -> None:
    torch.manual_seed(0)
    channel = Posterior(6)
    with torch.no_grad():
        channel.weight += 0.3 * torch.randn_like(channel.weight)
    hidden, noise = torch.randn(5, 6), torch.randn(5, 6)
    drawn, divergence = channel(hidden, noise)
    mean, log_variance = (hidden @ channel.weight.T + channel.bias).chunk(2, dim=1)
    spread = (0.5 * log_variance).exp()
    torch.testing.assert_close(drawn, mean + spread * noise)
    posterior, prior = torch.distributions.Normal(mean, spread), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(posterior, prior).sum())


def test_weights_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "a")
    config = (folder / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 40')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"has shape \(48, 32\), its config.json requires \(40, 32\)"):
        load_model(ModelConfig(base=str(folder), dtype="float32"), folder, TextTokenizer(folder), seed=0)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "a")
    config = (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"the weights lack model.layers.2\..* and 6 more"):
        load_model(ModelConfig(base=str(folder), dtype="float32"), folder, TextTokenizer(folder), seed=0)
