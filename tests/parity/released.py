"""The released program composed from transformers and diffusers, on small random weights: images to codes, chat, text to image.

Written from the published description, not from this package. Torch is imported inside functions.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from pathlib import Path

import numpy as np

from tests.encoder_tokenizers import CLIP_EOS, write_clip, write_t5
from tests.parity import reference_autoencoder, reference_clip, reference_mmdit, reference_siglip_vq, reference_t5, reference_transformer
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER

# The released geometry (16 pixels a token, VAE factor 8, 512 and 77 text ids) with small, odd and distinct widths.
TRANSFORMER = dict(
    vocab_size=384, mm_vocab_size=576, image_vocab_size=311, d_model=36, mlp_dim=52, n_heads=6, n_kv_heads=2, head_dim=10,
    n_language_layers=3, n_adapter_layers=2, n_head_layers=1,
)  # fmt: skip
SIGLIP_VQ = dict(width=24, layers=2, heads=3, mlp=40, patch=16, pos_grid=5, codebook_size=311, code_width=10, conv_blocks=2, groups=4)
MMDIT = dict(
    in_channels=20, n_heads=3, head_dim=10, axes_dims=(2, 2, 6), n_double=2, n_single=3, text_dim=14, pooled_dim=15, semantic_dim=24
)
AUTOENCODER = dict(
    latent_channels=5, block_channels=(6, 10, 14, 10), layers_per_block=2, groups=2, scaling_factor=0.3611, shift_factor=0.1159
)
T5 = dict(d_model=14, n_layers=2, n_heads=3, head_dim=5, mlp_dim=18, n_buckets=32, max_distance=128)
CLIP = dict(d_model=15, n_layers=2, n_heads=3, mlp_dim=22, max_length=77, eos_id=CLIP_EOS)
LIMITS = dict(short_size=48, long_size=112, patch_size=16, min_short_size=30, max_aspect_ratio=3.0)
T5_SPARE_ROWS = 3  # the released table has more rows than the tokenizer has tokens

# Qwen2.5's template for plain turns, default system prompt included: the model's own tokenizer says what a turn looks like.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write_tokenizers(folder: Path) -> dict[str, int]:
    """The three tokenizer folders of a model directory; returns the rows of the T5 and CLIP tables."""
    from transformers import PreTrainedTokenizerFast

    text = PreTrainedTokenizerFast.from_pretrained(TINY_TOKENIZER)
    text.chat_template = CHAT_TEMPLATE
    text.save_pretrained(folder / "tokenizer")
    return {"t5": write_t5(folder / "tokenizer_t5") + T5_SPARE_ROWS, "clip": write_clip(folder / "tokenizer_clip")}


def unified(forward):
    """The transformer as a model that transformers' `generate` can drive: one vocabulary, disallowed ids at the dtype's minimum."""
    import torch
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    first, codes = TRANSFORMER["vocab_size"], TRANSFORMER["image_vocab_size"]

    class Unified(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(PretrainedConfig(is_encoder_decoder=False))
            self.anchor, self.mode = torch.nn.Parameter(torch.zeros(1)), "text"

        def forward(self, input_ids, attention_mask=None, **kwargs):
            _, text, image = forward(input_ids)
            logits = torch.full((*input_ids.shape, first + TRANSFORMER["mm_vocab_size"]), torch.finfo(torch.float32).min)
            if self.mode == "text":
                logits[..., :first] = text
            else:
                logits[..., first : first + codes] = image
            return CausalLMOutput(logits=logits)

        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return {"input_ids": input_ids}

    return Unified().eval()


@contextlib.contextmanager
def drawing_with(gumbel_TV: np.ndarray):
    """`torch.multinomial` draws step t by the largest log-probability + gumbel[t]: the same noise, the same draw."""
    import torch

    steps, real = iter(gumbel_TV), torch.multinomial

    def draw(probs, num_samples):
        assert num_samples == 1 and probs.shape[0] == 1
        return torch.argmax(torch.log(probs) + torch.as_tensor(next(steps)), dim=-1, keepdim=True)

    torch.multinomial = draw
    try:
        yield
    finally:
        torch.multinomial = real
    assert next(steps, None) is None, "fewer draws than noise"


def preprocess(image, s: dict = LIMITS) -> np.ndarray | None:
    """A PIL image -> [H, W, 3] in [-1, 1], None when it is refused. Sizes stay Python numbers until they are rounded; PIL does the rest."""
    from PIL import Image

    image = image.convert("RGB")
    w, h = image.size
    if min(w, h) < s["min_short_size"] or max(w, h) / min(w, h) > s["max_aspect_ratio"]:
        return None
    if min(w, h) < s["short_size"]:
        factor = s["short_size"] / min(w, h)
        w, h = w * factor, h * factor
    if max(w, h) > s["long_size"]:
        factor = s["long_size"] / max(w, h)
        w, h = w * factor, h * factor
    w, h = (int(round(side / s["patch_size"])) * s["patch_size"] for side in (w, h))
    return (np.asarray(image.resize((w, h), resample=Image.BICUBIC), np.float32) / 255 - 0.5) / 0.5


def without_gradients(method):
    """Runs a method under `torch.no_grad`."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        import torch

        with torch.no_grad():
            return method(*args, **kwargs)

    return run


class Released:
    """All modules, and what the released scripts do with them. Images channels-last, codes [Y, X]."""

    def __init__(self, folder: Path, seed: int = 0):
        """`folder` gets the tokenizers, which are read back by the classes that FLUX names."""
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
        from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5TokenizerFast

        rows = write_tokenizers(folder)
        self.t5_sizes, self.clip_sizes = T5 | {"vocab_size": rows["t5"]}, CLIP | {"vocab_size": rows["clip"]}
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.net, forward = reference_transformer.build(seed, TRANSFORMER)
        self.language = unified(forward)
        self.vit, self.features = reference_siglip_vq.build_vit(seed, SIGLIP_VQ)
        self.projector = reference_siglip_vq.build_projector(seed, SIGLIP_VQ)
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        )
        self.pipe = FluxPipeline(
            scheduler=scheduler,
            vae=reference_autoencoder.build(seed, AUTOENCODER),
            text_encoder=reference_clip.build(seed, self.clip_sizes, eos_token_id=2),  # as FLUX.1-dev's config says: pool at the highest id
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer_clip"),
            text_encoder_2=reference_t5.build(seed, self.t5_sizes),
            tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_t5"),
            transformer=reference_mmdit.build(seed, MMDIT),
        )
        self.pipe.transformer.proj_out.weight.data.mul_(0.4)  # latents of about unit size, as real ones: the tolerance is absolute
        self.pipe.set_progress_bar_config(disable=True)

    def tensors(self) -> dict[str, dict[str, np.ndarray]]:
        """{component: {key in its released file: array}}; the tokenizer's two files with the prefixes of their modules."""
        state = lambda module: {k: v.numpy() for k, v in module.state_dict().items()}  # noqa: E731
        return {
            "transformer": state(self.net),
            "siglip_vq": reference_siglip_vq.released_names(self.vit, self.projector, lambda p: p.detach().numpy()),
            "mmdit": state(self.pipe.transformer),
            "autoencoder": state(self.pipe.vae),
            "t5": state(self.pipe.text_encoder_2),
            "clip": {k: p.detach().numpy() for k, p in reference_clip.released_names(self.pipe.text_encoder).items()},
        }

    # ---- images in ----
    @without_gradients
    def tokenize(self, image) -> np.ndarray:
        """Codes [Y, X]: the nearest codebook row, both sides of unit length."""
        import torch
        from torch.nn import functional as F

        z = self.projector.quant_conv(self.features(torch.tensor(preprocess(image)).permute(2, 0, 1)[None]))
        z, book = F.normalize(z, dim=1), F.normalize(self.projector.quantize.embedding.weight, dim=-1)
        return torch.cdist(z[0].permute(1, 2, 0).flatten(0, 1), book).argmin(-1).unflatten(0, z.shape[2:]).numpy()

    @without_gradients
    def semantics(self, codes_YX: np.ndarray):
        """[1, Y * X, D], from raw codebook rows."""
        import torch

        rows = self.projector.quantize.embedding(torch.tensor(codes_YX)).permute(2, 0, 1)[None]
        return self.projector.post_conv(self.projector.post_quant_conv(rows)).flatten(2).transpose(1, 2)

    # ---- chat ----
    def chat(self, image, question: str, max_new: int) -> tuple[list[int], list[int]]:
        """(ids of the whole turn, ids of the greedy answer up to its stop token)."""
        import torch
        from transformers import GenerationConfig

        codes = self.tokenize(image)
        names = "".join(f"<MM-Token-{k}>" for k in codes.ravel())
        content = f"<SOM>{codes.shape[0]} {codes.shape[1]}<IMAGE>{names}<EOM>\n{question}"
        turn = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([self.tokenizer.encode(turn, add_special_tokens=False)])
        stop = self.tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]
        config = GenerationConfig(do_sample=False, max_new_tokens=max_new, use_cache=False, eos_token_id=stop, pad_token_id=0)
        self.language.mode = "text"
        made = self.language.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return ids[0].tolist(), made[0, ids.shape[1] :].tolist()

    # ---- text to image ----
    def sample(self, prompt: str, grid: tuple[int, int], gumbel_TV: np.ndarray | None, **settings) -> np.ndarray:
        """Codes [Y, X] by transformers' own `generate`; without noise the likeliest. Settings not given are transformers' defaults."""
        import torch
        from transformers import GenerationConfig

        prefix, n = f"<SOM>{grid[0]} {grid[1]}<IMAGE>", grid[0] * grid[1]
        ids, negative = (torch.tensor([self.tokenizer.encode(t, add_special_tokens=False)]) for t in (prompt + prefix, prefix))
        specials = self.tokenizer.convert_tokens_to_ids(["<SOM>", "<EOM>", "<IMAGE>"])
        config = GenerationConfig(
            do_sample=gumbel_TV is not None, max_new_tokens=n, use_cache=False, pad_token_id=0, suppress_tokens=specials, **settings
        )
        self.language.mode = "image"
        draws = contextlib.nullcontext()
        if gumbel_TV is not None:
            noise = np.zeros((n, TRANSFORMER["vocab_size"] + TRANSFORMER["mm_vocab_size"]), np.float32)
            noise[:, TRANSFORMER["vocab_size"] :][:, : gumbel_TV.shape[1]] = gumbel_TV
            draws = drawing_with(noise)
        with draws:
            made = self.language.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, negative_prompt_ids=negative)
        return made[0, ids.shape[1] :].numpy().reshape(grid) - TRANSFORMER["vocab_size"]

    @without_gradients
    def decode(self, codes_YX: np.ndarray, prompt: str, noise_TC: np.ndarray, steps: int, guidance: float):
        """(latents [2Y, 2X, C], pixels [H, W, 3] before clipping, the image), by diffusers' own pipeline.

        The semantic map joins the image stream after the last double block; the empty prompt's forward gets none.
        """
        import torch

        pipe, semantics = self.pipe, self.semantics(codes_YX)
        # With guidance the pipeline runs the prompt and the empty prompt in turn.
        streams = itertools.cycle((semantics, torch.zeros_like(semantics)) if guidance > 1 else (semantics,))
        hook = pipe.transformer.transformer_blocks[-1].register_forward_hook(
            lambda module, inputs, out: (out[0], out[1] + pipe.transformer.siglip_embed(next(streams)))
        )
        height, width = 16 * codes_YX.shape[0], 16 * codes_YX.shape[1]
        tokens = pipe(
            prompt=[prompt], negative_prompt=[""], height=height, width=width, num_inference_steps=steps, guidance_scale=1.0,
            true_cfg_scale=guidance, latents=torch.tensor(noise_TC)[None], output_type="latent",
        ).images  # fmt: skip
        hook.remove()
        latents = pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
        image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
        return *(x[0].permute(1, 2, 0).numpy() for x in (latents, pixels)), image
