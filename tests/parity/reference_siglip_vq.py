"""The tokenizer in torch: transformers' SigLIP encoder with the release's differences, the quantiser from its equations."""

from __future__ import annotations

import numpy as np

# Odd, distinct sizes: a swapped axis cannot pass. The grid of learned positions is larger than Y and smaller than X.
SIZES = dict(width=24, layers=2, heads=3, mlp=40, patch=4, pos_grid=5, codebook_size=19, code_width=10, conv_blocks=2, groups=4)
BATCH, ROWS, COLUMNS = 3, 3, 7
QUANTIZER_WEIGHT = 0.7
SKIP = np.array([False, True, False])


def build_vit(seed: int, s: dict = SIZES):
    """SiglipVisionModel with exact GELU, no final norm, no head, bilinear positions; features: the last layer's output."""
    import torch
    from torch.nn import functional as F
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(seed)
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=s["width"],
            intermediate_size=s["mlp"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            patch_size=s["patch"],
            image_size=s["patch"] * s["pos_grid"],
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            vision_use_head=False,
            attn_implementation="eager",
        )
    ).eval()
    vit = getattr(model, "vision_model", model)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.15 * torch.randn_like(p))

    def positions(embeddings, height, width):
        grid = vit.embeddings.position_embedding.weight.reshape(1, s["pos_grid"], s["pos_grid"], -1).permute(0, 3, 1, 2)
        size = (height // s["patch"], width // s["patch"])
        grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=False, antialias=False)
        return grid.permute(0, 2, 3, 1).reshape(1, -1, s["width"])

    vit.embeddings.interpolate_pos_encoding = positions

    def features(pixels):
        kept = []
        hook = vit.encoder.layers[-1].register_forward_hook(lambda module, args, out: kept.append(out if torch.is_tensor(out) else out[0]))
        model(pixels, interpolate_pos_encoding=True)
        hook.remove()
        return kept[0].transpose(1, 2).unflatten(2, (pixels.shape[2] // s["patch"], -1))

    return vit, features


def build_projector(seed: int, s: dict = SIZES):
    """Modules of the quantiser and the decoder behind it, by their released names."""
    import torch
    from torch import nn

    torch.manual_seed(seed + 1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.GroupNorm(s["groups"], s["width"], eps=1e-5) for _ in range(2))
            self.conv1, self.conv2 = (nn.Conv2d(s["width"], s["width"], 3, padding=1) for _ in range(2))

        def forward(self, x):
            inner = self.conv1(nn.functional.gelu(self.norm1(x)))
            return x + self.conv2(nn.functional.gelu(self.norm2(inner)))

    projector = nn.Module()
    projector.quant_conv = nn.Conv2d(s["width"], s["code_width"], 1)
    projector.quantize = nn.Module()
    projector.quantize.embedding = nn.Embedding(s["codebook_size"], s["code_width"])
    projector.post_quant_conv = nn.Conv2d(s["code_width"], s["width"], 1)
    projector.post_conv = nn.Sequential(*(Block() for _ in range(s["conv_blocks"])))
    with torch.no_grad():
        for p in projector.post_conv.parameters():
            p.add_(0.1 * torch.randn_like(p))
        # Rows far from unit length: reading the normalised row in place of the raw one must show.
        projector.quantize.embedding.weight.mul_(torch.linspace(0.5, 2.0, s["codebook_size"])[:, None])
    return projector


def _quantize(z, codebook, skip):
    """The equations: z [B, C, Y, X] -> rows [B, Y, X, C], codes [B, Y, X], the three loss terms."""
    import torch
    from torch.nn import functional as F

    z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
    unit = F.normalize(codebook, dim=-1)
    d = ((z[..., None, :] - unit) ** 2).sum(-1)
    codes = d.argmin(-1)
    soft = torch.softmax(-d / 2.0, dim=-1)
    hard = F.one_hot(codes, codebook.shape[0]).to(z.dtype)
    straight = (hard - soft.detach() + soft) @ codebook
    chosen = hard @ codebook
    terms = (
        torch.mean((straight - z) ** 2),
        torch.mean((chosen.detach() - z) ** 2),
        torch.mean((chosen - z.detach()) ** 2),
    )
    rows = torch.where(torch.as_tensor(skip)[:, None, None, None], z, straight)
    return rows, codes, terms


def released_names(vit, projector, values) -> dict[str, np.ndarray]:
    """`values(parameter)` of parameters under its released key; q, k and v are apart in transformers, stacked in the release."""
    out = {
        "vit.pos_embed": values(vit.embeddings.position_embedding.weight)[None],
        "vit.patch_embed.proj.weight": values(vit.embeddings.patch_embedding.weight),
        "vit.patch_embed.proj.bias": values(vit.embeddings.patch_embedding.bias),
    }
    for i, layer in enumerate(vit.encoder.layers):
        a = layer.self_attn
        parts = {
            "norm1": layer.layer_norm1,
            "norm2": layer.layer_norm2,
            "attn.proj": a.out_proj,
            "mlp.fc1": layer.mlp.fc1,
            "mlp.fc2": layer.mlp.fc2,
        }
        for leaf in ("weight", "bias"):
            out |= {f"vit.blocks.{i}.{name}.{leaf}": values(getattr(module, leaf)) for name, module in parts.items()}
            stacked = [values(getattr(module, leaf)) for module in (a.q_proj, a.k_proj, a.v_proj)]
            out[f"vit.blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(stacked)
    return out | {f"vqproj.{name}": values(p) for name, p in projector.named_parameters()}


def outputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, inputs, outputs and gradients of one training forward.

    The scalar differentiated is sum(semantics * cotangent) + 0.7 * (the weighted sum of the loss terms).
    """
    import torch

    vit, features = build_vit(seed)
    projector = build_projector(seed)
    g = torch.Generator().manual_seed(seed + 2)
    s = SIZES
    pixels = torch.rand(BATCH, 3, ROWS * s["patch"], COLUMNS * s["patch"], generator=g) * 2 - 1
    cotangent = torch.randn(BATCH, s["width"], ROWS, COLUMNS, generator=g)

    def decode(rows):
        return projector.post_conv(projector.post_quant_conv(rows.permute(0, 3, 1, 2)))

    book = projector.quantize.embedding.weight
    f = features(pixels)
    rows, codes, terms = _quantize(projector.quant_conv(f), book, SKIP)
    semantics = decode(rows)
    loss = terms[0] + terms[1] + 0.25 * terms[2]
    (torch.sum(semantics * cotangent) + QUANTIZER_WEIGHT * loss).backward()
    with torch.no_grad():
        from_codes = decode(book[codes])
        # Smaller than the grid in one direction, larger in the other, the other way round.
        tall = torch.rand(1, 3, 6 * s["patch"], 2 * s["patch"], generator=g) * 2 - 1
        tall_features = features(tall)

    def last(x):
        return x.detach().permute(0, 2, 3, 1).numpy()

    result = {
        "in/pixels": last(pixels),
        "in/tall": last(tall),
        "in/cotangent": last(cotangent),
        "in/skip": SKIP,
        "out/features": last(f),
        "out/tall": last(tall_features),
        "out/codes": codes.numpy().astype(np.int32),
        "out/semantics": last(semantics),
        "out/from_codes": last(from_codes),
        "out/losses": np.array([t.item() for t in (*terms, loss)], np.float32),
    }
    result |= {f"w/{k}": v for k, v in released_names(vit, projector, lambda p: p.detach().numpy().copy()).items()}
    return result | {f"grad/{k}": v for k, v in released_names(vit, projector, lambda p: p.grad.numpy().copy()).items()}
