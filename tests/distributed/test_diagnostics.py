"""Stage 1's held-out measurements equal plain PyTorch, one text at a time, at 1, 2, 3 and 4 ranks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lbr_dist.data.targets import LearnData
from lbr_dist.heldout.texts import effective_rank
from tests import tiny
from tests.configs import tiny_run
from tests.distributed import on_ranks, single
from tests.ranks import RankPool


@pytest.mark.parametrize("form", ["mask", "reinject"])
@torch.no_grad()
def test_diagnostics_equal_one_process(
    pool: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path, form: str
) -> None:
    config = tiny_run(tmp_path, tiny_model, tiny_data)
    config = dataclasses.replace(config, learn=dataclasses.replace(config.learn, bottleneck=form, text_weight=0.0))
    model, tokenizer = single.model_of(config)
    sink = tokenizer.sink_id
    texts = tokenizer.encode(list(tiny.texts().values())[:7])
    sequences = LearnData([], [], tokenizer.drop_id, texts).held_out_sequences(config.learn, 4)
    others = [*sequences[1:], sequences[0]]
    shuffled = [dataclasses.replace(s, context=o.context) for s, o in zip(sequences, others, strict=True)]
    embed, head = model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings()

    def plain(text: tuple[int, ...], fed: tuple[int, ...]) -> torch.Tensor:
        inputs = embed(torch.tensor([sink, *fed[:-1]]))
        hidden = single._forward(model, inputs, torch.arange(len(inputs)), single._causal(len(inputs)))
        return F.cross_entropy(head(hidden), torch.tensor(text), reduction="none")

    fed = [s.target if s.target_inputs is None else s.target_inputs for s in sequences]
    alone = torch.cat([plain(s.target, inputs) for s, inputs in zip(sequences, fed, strict=True)])
    text_losses = torch.cat([plain(text, text)[1:] for text in texts])
    vectors = torch.stack([single.embed(model, text, sink, "bottleneck_mean") for text in texts])
    expected = {
        "heldout_target_loss": float(single.learn_loss(model, sequences, sink, config.learn)),
        "heldout_target_loss_shuffled": float(single.learn_loss(model, shuffled, sink, config.learn)),
        "heldout_target_loss_without": float(alone.mean()),
        "heldout_perplexity": math.exp(float(text_losses.mean())),
        "effective_rank": effective_rank(F.normalize(vectors, dim=1)),
        "effective_rank_limit": 6.0,
    }
    assert len(set(expected.values())) == len(expected)
    for values in pool.run(on_ranks.diagnose, config=config, held_out=texts):
        assert values == pytest.approx(expected, rel=2e-5)


def test_effective_rank() -> None:
    directions = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    both = torch.cat([directions[:5], -directions[:5]])  # centred, five directions with equal strength
    assert effective_rank(both) == pytest.approx(5.0)
    assert effective_rank(torch.ones(4, 3)) == pytest.approx(1.0)
    line = torch.linspace(-1, 1, 9)[:, None] * directions[0]
    assert effective_rank(line) == pytest.approx(1.0)
