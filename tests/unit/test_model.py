"""The model: packed rows equal one sequence at a time in every family, and nothing leaks past the bottleneck."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lbr_dist.config import ModelConfig
from lbr_dist.data.packing import Sequence, pack
from lbr_dist.errors import ModelError
from lbr_dist.kernels.attention import TARGET
from lbr_dist.model.bottleneck import LBRModel, load_model
from lbr_dist.model.tokens import TextTokenizer
from tests import tiny
from tests.distributed import single


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LBRModel]:
    tied = request.param != "qwen2"
    folder = tiny.write_model(tmp_path_factory.mktemp("family") / request.param, request.param, tied)
    config = ModelConfig(base=str(folder), bottleneck_tokens=4, dtype="float32")
    return folder, load_model(config, folder, TextTokenizer(folder), seed=0)


def sequences(folder: Path) -> tuple[TextTokenizer, list[Sequence]]:
    tokenizer = TextTokenizer(folder)
    ids = tokenizer.encode(list(tiny.texts().values())[:9])
    made = [Sequence(i[: len(i) // 2], 4, i[len(i) // 2 :]) for i in ids[:6]]
    return tokenizer, [*made, *(Sequence(i, 4, i, tuple(1 if t % 3 == 0 else t for t in i)) for i in ids[6:])]


def test_embeddings_are_hugging_faces(family: tuple[Path, LBRModel]) -> None:
    folder, model = family
    tokenizer, _ = sequences(folder)
    texts = tokenizer.encode(list(tiny.texts().values())[:7])
    rows = pack([Sequence(t, 4) for t in texts], 96, tokenizer.sink_id)
    assert len(rows.input_ids) < len(texts), "nothing was packed together"
    found = model(rows, task="embed", pooling="bottleneck_last")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embed = plain.get_input_embeddings()
    for vector, index in zip(found, rows.order.tolist(), strict=True):
        x = torch.tensor([[tokenizer.sink_id, *texts[index]]])
        bottleneck = model.bottleneck * getattr(embed, "embed_scale", 1.0)
        expected = plain.model(inputs_embeds=torch.cat([embed(x), bottleneck[None]], dim=1))[0][0, -1]
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["mask", "reinject"])
def test_packed_loss_is_one_at_a_time(family: tuple[Path, LBRModel], form: str) -> None:
    folder, model = family
    tokenizer, batch = sequences(folder)
    # longer than the window of the families that have one, which `single` does not know: keep them within it
    if getattr(model.backbone.config, "sliding_window", None):
        batch = [Sequence(s.context[:5], 4, s.target[:5]) for s in batch]
    counts = (sum(len(s.context) - 1 for s in batch), sum(len(s.target) for s in batch))
    rows = pack(batch, 96, tokenizer.sink_id)
    model.zero_grad()
    loss, sums = model(rows, task="learn", form=form, weights=(0.5 / counts[0], 1.0 / counts[1]))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert sums[2:].tolist() == [counts[1], counts[0]]
    reference = load_model(
        ModelConfig(base=str(folder), bottleneck_tokens=4, dtype="float32"), folder, tokenizer, seed=0
    )
    expected = single.learn_loss(reference, batch, tokenizer.sink_id, form, 0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in single.gradients(reference, expected).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_nothing_leaks(family: tuple[Path, LBRModel]) -> None:
    """Without bottleneck tokens the target has no way to the text: another text must not move it by one bit."""
    folder, model = family
    tokenizer, batch = sequences(folder)
    other = [Sequence(tuple(reversed(s.context)), s.bottleneck, s.target, s.target_inputs) for s in batch]
    hidden = {}
    for k in (0, 4):
        for name, items in (("this", batch), ("other", other)):
            rows = pack([Sequence(s.context, k, s.target, s.target_inputs) for s in items], 96, tokenizer.sink_id)
            hidden[name, k] = model.hidden(rows)[rows.roles == TARGET]
    assert torch.equal(hidden["this", 0], hidden["other", 0])
    assert not torch.equal(hidden["this", 4], hidden["other", 4]), "the bottleneck carries nothing"


def test_a_foreign_row_changes_nothing(family: tuple[Path, LBRModel]) -> None:
    folder, model = family
    tokenizer, batch = sequences(folder)
    alone = pack(batch[:1], 96, tokenizer.sink_id)
    together = pack(batch[:3], 96, tokenizer.sink_id)
    span = together.spans[together.order == 0][0]
    first = model.hidden(alone)[0, : batch[0].length]
    start = int(span[1]) - 1
    torch.testing.assert_close(
        model.hidden(together)[int(span[0]), start : start + batch[0].length], first, rtol=1e-5, atol=1e-5
    )


def test_weights_of_another_shape(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "a")
    config = (folder / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 40')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"is of shape \(48, 32\), its config.json asks for \(40, 32\)"):
        load_model(ModelConfig(base=str(folder), dtype="float32"), folder, TextTokenizer(folder), seed=0)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "a")
    config = (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"the weights lack model.layers.2\..* and 6 more"):
        load_model(ModelConfig(base=str(folder), dtype="float32"), folder, TextTokenizer(folder), seed=0)
