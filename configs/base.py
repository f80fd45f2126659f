"""Defaults of every stage. A run's file starts from one of these functions and changes what differs; unknown keys fail."""

from ml_collections import ConfigDict


def _run(stage, learning_rate, **sections):
    return ConfigDict(
        dict(
            stage=stage,
            run_dir=f"runs/{stage}",
            init_from="",  # model directory with the frozen and the starting parameters
            seed=0,
            steps=1000,
            batch_size=64,  # examples per step over all devices; grpo: prompts per step
            log_every=10,
            save_every=200,
            save_minutes=0.0,  # also save after so many minutes; 0: by steps alone
            grid_every=200,  # image grids in RUN/images; 0: none
            keep=2,  # resumable checkpoints on disk, the newest
            keep_every=0,  # and for good those of steps that this divides; 0: no others
            mesh=dict(replica=1, data=1, fsdp=-1, tensor=1),  # -1: the remaining devices
            optimizer=dict(
                name="adamw",  # or muon, for the transformer's stages
                learning_rate=learning_rate,
                warmup_steps=50,
                schedule="cosine",  # constant | linear | cosine
                final_fraction=0.1,  # of learning_rate, at the last step
                b1=0.9,
                b2=0.95,
                weight_decay=0.0,
                clip_norm=1.0,
                rates=(),  # (path pattern, multiple of learning_rate), such as (".*/(scale|bias)", 100.0)
            ),
            **sections,
        )
    )


def _rendered():
    """The embedded rendered data set: signs and shapes."""
    return dict(
        split="train",
        sizes=((32, 64), (32, 128)),  # pixels, height x width
        weights=(0.7, 0.3),  # of the sizes
        text_lengths=((3, 6), (12, 16)),  # characters of a sign, per size
        shapes=0.2,  # share of images with shapes instead of a sign
        pseudo_words=0.3,  # share of made-up words
        other_faces=0.0,  # share of signs not in the main face
        centred=1.0,  # share of signs in the vertical middle
        on_grid=1.0,  # share of shape images whose shapes stand on the token grid
    )


def _stored(*components):
    """Components as `init_from` holds them; further keys of a section say how it is computed (dtype, remat, ...)."""
    return {name: dict(preset="stored") for name in components}


def tokenizer():
    """SigLIP-VQ through understanding."""
    return _run(
        "tokenizer",
        2e-3,
        siglip_vq=dict(preset="tiny", dtype="float32", remat="none"),
        reader=dict(preset="tiny", dtype="float32", remat="none"),  # the language model that reads quantised features
        tokenizer=dict(
            warmup_steps=200,  # on continuous features, before there is a codebook
            ramp_steps=100,  # quantisation grows to its full share
            start_batches=8,  # batches whose encoder outputs the codebook starts from
            restart_every=25,  # of dead codes; 0: never
            restart_until=0.7,  # share of the run
            usage_decay=0.98,
            text_length=48,
            answer_weight=1.0,
            dense_weight=1.0,
            quantizer_weight=1.0,
        ),
        preprocess=dict(short_size=32, long_size=128, min_short_size=16, max_aspect_ratio=4.0),  # limits of input images
        data=_rendered(),
    )


def _next_token(stage, phase, learning_rate):
    return _run(
        stage,
        learning_rate,
        transformer=dict(preset="tiny", dtype="float32", remat="none"),
        next_token=dict(
            phase=phase,  # a row of the freeze table: vision | all
            generation=0.8,  # caption -> image
            understanding=0.15,  # image + question -> answer
            text=0.05,
            drop_prompt=0.1,  # generation without its caption, for guidance
            row_length=208,  # packed rows: two signs of 16 characters with their captions
            rows=16,
            image_weight=1.0,
            target_share=1.0,  # room for targets of each kind per row
            chunk=0,  # positions per piece of the heads; 0: all at once
        ),
        data=_rendered(),
    )


def pretrain(phase="all"):
    """Next-token pre-training; phase "vision" trains the new parameters alone."""
    return _next_token("pretrain", phase, 2e-3)


def sft():
    """Supervised fine-tuning on generation and understanding."""
    return _next_token("sft", "all", 3e-4)


def decoder():
    """The diffusion decoder by flow matching on codes of real images."""
    return _run(
        "decoder",
        1e-3,
        **_stored("siglip_vq"),
        mmdit=dict(preset="tiny", dtype="float32", remat="none"),
        t5=dict(preset="tiny", dtype="float32"),
        clip=dict(preset="tiny", dtype="float32"),
        autoencoder=dict(preset="identity-4"),
        decoder=dict(
            drop_condition=0.1,  # zero semantics and empty prompt, for guidance
            sigma="logit_normal",  # or uniform
            sigma_mean=0.0,
            sigma_std=1.0,
            train_text_encoders=True,
        ),
        decode=dict(steps=8, guidance=1.0, text_length=32, pooled_length=32, base_shift=0.5, max_shift=1.15),  # the model's defaults
        data=_rendered(),
    )


def grpo():
    """On-policy GRPO with remote rewards."""
    c = _run(
        "grpo",
        1e-6,
        **_stored("transformer", "siglip_vq", "mmdit", "t5", "clip", "autoencoder"),
        grpo=dict(
            rollouts_per_prompt=16,  # G
            updates_per_batch=1,  # 1: on-policy
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.01,  # beta
            kl_estimator="k3",
            kl_importance=False,
            ratio="token",  # token | sequence | trajectory
            reduction="grpo",
            delta=None,
            ratio_cap=5.0,
            max_length=None,
            log_ratio_cap=20.0,
        ),
        advantage=dict(ddof=1, eps=1e-4, scale="group", baseline="mean", clip=None),
        sampling=dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=1.0),  # of the rollouts
        rollout=dict(
            prompt_length=32,  # tokens with the image prefix; a longer prompt is an error
            segment=512,  # most codes drawn between two looks for a signal to stop
            noise="group",  # decoder noise per prompt group, or independent
            chunks=2,  # one is scored while the next is sampled
            micro_batch=0,  # rollouts per accumulation step; 0: all at once
            logit_chunk=0,
            max_logp_gap=1e-4,
            max_fail_frac=0.5,
            combine="sum_then_normalize",  # or normalize_then_sum
            reference_dtype="float32",  # of the reference's matrices; bfloat16 halves them, and loses nothing where it is computed in
        ),
        decoder_mesh=dict(replica=1, data=1, fsdp=0, tensor=1),  # devices of the decoder alone; a 0: it shares those of config.mesh
        decode=dict(steps=None, guidance=None),  # None: the model's own
        rewards=dict(  # weight None: not asked
            ocr=dict(urls=("http://127.0.0.1:8001",), weight=1.0),
            shapes=dict(urls=("http://127.0.0.1:8002",), weight=1.0),
            quality=dict(urls=("http://127.0.0.1:8003",), weight=None),
        ),
        data=_rendered(),
    )
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.batch_size = 32
    c.log_every = 1
    c.data.sizes, c.data.weights, c.data.text_lengths, c.data.shapes = ((32, 64),), (1.0,), ((3, 6),), 0.0
    c.data.pseudo_words = 0.0
    return c


def inference():
    """Drawing and answering: what `xomni generate`, `chat` and `eval` take with --config. Their own options come on top."""
    return ConfigDict(
        dict(
            stage="inference",
            model="xomni_jax/assets/tiny_sft",
            height=None,  # pixels; None: the model's own
            width=None,
            temperature=1.0,
            top_k=50,  # as released; 0: off
            top_p=1.0,
            min_p=0.03,  # as released
            guidance=1.0,
            batch=16,  # images or answers at a time, of each data-parallel part of the mesh
            decode_batch=16,  # images decoded to pixels at a time
            prompt_length=512,  # tokens that a plan counts on, with the image prefix
            max_tokens=32,  # of an answer, that a plan counts on
            mesh=dict(replica=1, data=1, fsdp=-1, tensor=1),
            decode=dict(steps=None, guidance=None),  # None: the model's own
            **_stored("transformer", "siglip_vq", "mmdit", "t5", "clip", "autoencoder"),
        )
    )
