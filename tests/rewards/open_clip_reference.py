"""open_clip's CLIP in its own layout of weights, written with torch alone; ViT-H/14's widths of heads (80 and 64)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """One residual attention block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


def stack(width, heads, layers):
    return nn.ModuleDict({"resblocks": nn.ModuleList(Block(width, heads) for _ in range(layers))})


class Vision(nn.Module):
    def __init__(self, width, layers, patch, size, dim):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.empty(width, dim))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = stack(width, width // 80, layers)

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """Unit features of normalised images, and of ids that are padded with zeros."""

    def __init__(self, vocabulary: int, dim: int = 24, patch: int = 14, size: int = 28):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(77, 64))
        self.text_projection = nn.Parameter(torch.empty(64, dim))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.visual = Vision(160, 2, patch, size, dim)
        self.transformer = stack(64, 1, 3)
        self.token_embedding = nn.Embedding(vocabulary, 64)
        self.ln_final = nn.LayerNorm(64)

    def images(self, pixels):
        return F.normalize(self.visual(pixels), dim=-1)

    def texts(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((77, 77), float("-inf")).triu(1)
        for block in self.transformer["resblocks"]:
            x = block(x, mask)
        return F.normalize(self.ln_final(x)[range(len(x)), ids.argmax(-1)] @ self.text_projection, dim=-1)
