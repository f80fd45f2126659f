"""LlamaGen's VQ tokenizer in torch, written from its description with the keys of its published files, small."""

from __future__ import annotations

import numpy as np

# Odd, distinct sizes: a swapped axis cannot pass. The first level is wider than what comes before it, the last narrower than the first.
SIZES = dict(
    codebook_size=23, code_width=5, z_channels=7, in_features=4, block_channels=(10, 6), layers_per_block=1, groups=2, entropy_weight=0.3
)


def build(seed: int, s: dict = SIZES):
    """The module with random weights, and its functions encode (to unit z) and decode (from rows)."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(seed)

    def norm(width):
        return nn.GroupNorm(s["groups"], width, eps=1e-6)

    def conv(a, b, size=3, **kw):
        return nn.Conv2d(a, b, size, padding=size // 2 if not kw else 0, **kw)

    class Residual(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.norm1, self.conv1, self.norm2, self.conv2 = norm(a), conv(a, b), norm(b), conv(b, b)
            if a != b:
                self.nin_shortcut = conv(a, b, 1)

        def forward(self, x):
            inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
            return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)

    class Attention(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm = norm(width)
            self.q, self.k, self.v, self.proj_out = (conv(width, width, 1) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(self.norm(x)).flatten(2) for f in (self.q, self.k, self.v))
            weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5, -1)
            return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).unflatten(2, x.shape[2:]))

    class Half(nn.Module):
        """Encoder or decoder; the decoder counts its levels from the deepest."""

        def __init__(self, a, widths, out, blocks, up):
            super().__init__()
            deep, width = (0, widths[0]) if up else (len(widths) - 1, s["in_features"])
            self.conv_in, self.conv_blocks = conv(a, width), nn.ModuleList()
            for i, b in enumerate(widths):
                level = nn.Module()
                level.res = nn.ModuleList(Residual(width if j == 0 else b, b) for j in range(blocks))
                level.attn = nn.ModuleList(Attention(b) for _ in range(blocks if i == deep else 0))
                width = b
                if i < len(widths) - 1:
                    sample = nn.Module()
                    sample.conv = conv(b, b) if up else conv(b, b, stride=2)
                    setattr(level, "upsample" if up else "downsample", sample)
                self.conv_blocks.append(level)
            middle = widths[0] if up else width
            self.mid = nn.ModuleList((Residual(middle, middle), Attention(middle), Residual(middle, middle)))
            self.norm_out, self.conv_out, self.up = norm(width), conv(width, out), up

        def forward(self, x):
            x = self.conv_in(x)
            middle = lambda x: self.mid[2](self.mid[1](self.mid[0](x)))  # noqa: E731
            x = middle(x) if self.up else x
            for level in self.conv_blocks:
                for j, block in enumerate(level.res):
                    x = block(x)
                    x = level.attn[j](x) if level.attn else x
                if hasattr(level, "upsample"):
                    x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
                if hasattr(level, "downsample"):
                    x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
            return self.conv_out(F.silu(self.norm_out(x if self.up else middle(x))))

    n, widths = s["layers_per_block"], s["block_channels"]
    model = nn.Module()
    model.encoder, model.decoder = Half(3, widths, s["z_channels"], n, False), Half(s["z_channels"], widths[::-1], 3, n + 1, True)
    model.quant_conv, model.post_quant_conv = conv(s["z_channels"], s["code_width"], 1), conv(s["code_width"], s["z_channels"], 1)
    model.quantize = nn.Module()
    model.quantize.embedding = nn.Embedding(s["codebook_size"], s["code_width"])
    model.quantize.register_buffer("codebook_used", torch.zeros(65536))
    for p in model.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
    encode = lambda x: F.normalize(model.quant_conv(model.encoder(x)).permute(0, 2, 3, 1), dim=-1)  # noqa: E731
    return model, encode, lambda rows: model.decoder(model.post_quant_conv(rows.permute(0, 3, 1, 2)))


def outputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, pixels [B, H, W, 3], codes, both directions, losses, and gradients of mean(reconstruction^2) + the sum of the losses."""
    import torch
    from torch.nn import functional as F

    model, encode, decode = build(seed)
    pixels = torch.rand(2, 3, 6, 10) * 2 - 1
    z, unit = encode(pixels), F.normalize(model.quantize.embedding.weight, dim=-1)
    d = ((z[..., None, :] - unit) ** 2).sum(-1)
    codes = d.argmin(-1)
    rows = unit[codes]
    logits = -d.flatten(0, 2) / 0.01
    p = logits.softmax(-1)
    entropy = -(p * (logits + 1e-5).log_softmax(-1)).sum(-1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    terms = {"codebook": ((rows - z.detach()) ** 2).mean(), "commitment": ((rows.detach() - z) ** 2).mean(), "entropy": entropy}
    quantizer = terms["codebook"] + 0.25 * terms["commitment"] + SIZES["entropy_weight"] * entropy
    made = decode(z + (rows - z).detach())
    (made.square().mean() + quantizer).backward()
    last = lambda x: x.detach().permute(0, 2, 3, 1).contiguous().numpy()  # noqa: E731
    arrays = {"in/pixels": last(pixels), "out/z": z.detach().numpy(), "out/codes": codes.numpy().astype(np.int32)}
    arrays |= {"out/rows": rows.detach().numpy(), "out/pixels": last(made)}
    arrays |= {f"loss/{k}": v.detach().numpy() for k, v in (terms | {"quantizer": quantizer}).items()}
    arrays |= {f"w/{k}": v.numpy() for k, v in model.state_dict().items() if k != "quantize.codebook_used"}
    return arrays | {f"grad/{k}": v.grad.numpy() for k, v in model.named_parameters()}
