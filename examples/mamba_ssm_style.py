"""A language model written against mamba_ssm, trained and sampled on the CPU without mamba_ssm.

Everything below `install()` is code as it stands in projects that use mamba_ssm: its import, its block, its decoding.

    python examples/mamba_ssm_style.py               # 150 steps, some seconds
    python examples/mamba_ssm_style.py --steps 1000
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from pixelbytes_kernels import compat

compat.install()
from mamba_ssm import Mamba  # noqa: E402
from mamba_ssm.utils.generation import InferenceParams  # noqa: E402

TEXT = (
    "the cat sat on the mat and the dog lay by the door. the rain fell on the roof and the wind blew through the tree. "
    "the bird sang in the tree and the fish swam in the sea. "
) * 4


class Block(nn.Module):
    def __init__(self, dim: int, layer_idx: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer = Mamba(d_model=dim, d_state=16, d_conv=4, expand=2, layer_idx=layer_idx)

    def forward(self, x, inference_params=None):
        return x + self.mixer(self.norm(x), inference_params=inference_params)


class LanguageModel(nn.Module):
    def __init__(self, vocab: int, dim: int = 64, layers: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(Block(dim, i) for i in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids, inference_params=None):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, inference_params)
        return self.head(self.norm(x))


@torch.no_grad()
def sample(model: LanguageModel, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Continues ids (1, prompt): the prompt in one pass, then token by token from the blocks' states."""
    params = InferenceParams(max_seqlen=ids.shape[1] + length, max_batch_size=1)
    logits = model(ids, params)
    params.seqlen_offset = ids.shape[1]
    for _ in range(length):
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        logits = model(ids[:, -1:], params)
        params.seqlen_offset += 1
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps (default 150)")
    parser.add_argument("--seqlen", type=int, default=128, help="characters of a training window (default 128)")
    steps, seqlen = (arguments := parser.parse_args()).steps, arguments.seqlen

    torch.manual_seed(0)
    letters = sorted(set(TEXT))
    data = torch.tensor([letters.index(c) for c in TEXT])
    model = LanguageModel(len(letters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(data) - seqlen - 1, (8,)).tolist()
        batch = torch.stack([data[s : s + seqlen + 1] for s in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}")
    prompt = "the cat "
    ids = sample(model, torch.tensor([[letters.index(c) for c in prompt]]), 60)
    print("".join(letters[i] for i in ids[0].tolist()))


if __name__ == "__main__":
    main()
