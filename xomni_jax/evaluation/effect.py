"""What reinforcement learning changed: SFT against RL on held-out prompts, with best-of-N, guidance and temperature in between.

The paper's claim (X-Omni, arXiv 2507.22058): one sample after RL beats SFT's best of N. Best-of-N picks with the reward that RL
trains on and knows the wanted text, so it is an oracle that nobody has when drawing; it bounds what choosing among SFT's
samples could give.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xomni_jax.checkpoint.store import config_to_json, read_model_json, write_json
from xomni_jax.evaluation.cells import Cell, EvaluationError, cell_key, directory_stamp, measure
from xomni_jax.evaluation.drawing import Chunk, Drawing, Signs, heldout_signs
from xomni_jax.evaluation.grpo_run import GRPORun, read_run
from xomni_jax.evaluation.summary import summarise
from xomni_jax.rewards.client import RewardClient
from xomni_jax.sampling.logits import SamplingConfig

SERVICES = {"ocr": "ocr", "shapes": "shapes", "second": "tesseract"}  # role here -> scorer that must answer


@dataclass(frozen=True)
class EffectConfig:
    """What is compared, and how.

    Attributes:
      sft, rl: model directories; they share tokenizer and decoder. rl_run: the GRPO run that made `rl`.
      out: where report.json, report.html and the finished cells go.
      prompts: held-out signs. samples: of SFT per prompt, the largest best-of-N. rl_samples, sweep_samples: per prompt.
      guidance: of the AR part in the "on" setting; "off" is 1.
      size: pixels, height and width. lengths: least and most characters of a sign.
      seed: of signs, samples and decoder noise.
      temperature, top_k, top_p, min_p: of all samples but the sweep's temperature; the defaults are those of the rollouts.
      temperatures: of the sweep over SFT; 0 is greedy.
      chunk: images decoded at a time.
    """

    sft: str
    rl: str
    rl_run: str
    out: str
    prompts: int = 64
    samples: int = 16
    rl_samples: int = 4
    sweep_samples: int = 4
    guidance: float = 2.0
    size: tuple[int, int] = (32, 64)
    lengths: tuple[int, int] = (3, 6)
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    temperatures: tuple[float, ...] = (1.0, 0.7, 0.5, 0.3, 0.0)
    chunk: int = 128

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "rl_samples", "sweep_samples", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.prompts < 2:
            raise ValueError("prompts=1 gives no interval; use at least 2, better 64")
        if self.guidance == 1.0:
            raise ValueError("guidance=1 is the setting without guidance, which is measured anyway; give another value, such as 2")

    def sampling(self, guidance: float, temperature: float | None = None) -> SamplingConfig:
        """How codes are drawn in one setting."""
        temperature = self.temperature if temperature is None else temperature
        return SamplingConfig(temperature, self.top_k, self.top_p, self.min_p, guidance)

    def guidances(self) -> dict[str, float]:
        """Setting -> guidance."""
        return {"guidance_off": 1.0, "guidance_on": self.guidance}


@dataclass(frozen=True)
class Setting:
    """The cells of one guidance setting; `sweep` holds SFT by temperature."""

    reconstruction: Cell
    sft: Cell
    rl: Cell
    sweep: dict[float, Cell]


@dataclass(frozen=True)
class Effect:
    """Everything measured: the report is made of this."""

    config: EffectConfig
    signs: Signs
    run: GRPORun
    real: Cell
    settings: dict[str, Setting]


@contextlib.contextmanager
def open_services(urls: Mapping[str, str]) -> Iterator[tuple[dict[str, RewardClient], dict[str, str]]]:
    """Clients by role and the versions of what answers. `urls`: "ocr" (needed), "shapes", "second"; several URLs by commas.

    Raises:
      EvaluationError: no OCR service is named.
      RewardServiceError: a service does not answer or serves something else.
    """
    if not urls.get("ocr"):
        raise EvaluationError(
            "no OCR service is given; start one with: xomni serve-reward ocr --port 8001, and pass --ocr http://127.0.0.1:8001"
        )
    with contextlib.ExitStack() as stack:
        clients, versions = {}, {}
        for role, scorer in SERVICES.items():
            if urls.get(role):
                clients[role] = stack.enter_context(RewardClient(scorer, urls[role].split(","), max_wait=900.0))
                versions[role] = clients[role].versions()
        yield clients, versions


def run_effect(
    config: EffectConfig,
    clients: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
    started: float | None = None,
    first_image_seconds: float | None = None,
) -> tuple[Effect, dict[str, Any]]:
    """Measures every cell, or takes it from OUT/cells, and writes OUT/report.json. Returns what was measured and the report.

    Args:
      clients: role ("ocr", "shapes", "second") -> client; see `open_services`.
      versions: role -> version, so that images are scored again after a service changed.
      started: time.time() at the beginning of the whole job, for wall_seconds; now without it.
      first_image_seconds: how long the first image took, to be reported.

    Raises:
      ValueError: a run, model or service that does not fit (`EvaluationError`, `CheckpointError`), in one sentence.
    """
    began = time.time()
    run = read_run(config.rl_run)
    effect = measure_cells(config, run, clients, versions or {})
    seconds = {
        "first_image_seconds": first_image_seconds,
        "wall_seconds": time.time() - (began if started is None else started),
        "evaluation_seconds": time.time() - began,
    }
    report = summarise(effect, seconds)
    write_json(Path(config.out) / "report.json", report)
    return effect, report


def measure_cells(config: EffectConfig, run: GRPORun, clients: Mapping[str, Any], versions: Mapping[str, str]) -> Effect:
    """All cells of the comparison, those on disk taken from there."""
    for directory in (config.sft, config.rl):
        read_model_json(directory)
    signs = heldout_signs(config.prompts, config.size, config.lengths, config.seed)
    drawing = Drawing(config.sft, config.rl, signs, config.seed, config.chunk)
    facts = {
        "signs": [config.prompts, config.size, config.lengths, config.seed],
        "decode": config_to_json(drawing.model.decode_config),
        "services": {role: versions.get(role, "") for role in sorted(clients)},
    }
    stamps = {"sft": directory_stamp(config.sft), "rl": directory_stamp(config.rl)}
    swept = {g: [t for t in config.temperatures if t != config.temperature] for g in config.guidances()}
    shots = lambda t, n: 1 if t == 0 else n  # noqa: E731 - greedy samples of a prompt are all the same image
    total = 2 + sum(
        shots(config.temperature, config.samples)
        + shots(config.temperature, config.rl_samples)
        + sum(shots(t, config.sweep_samples) for t in ts)
        for ts in swept.values()
    )

    with tqdm(total=total * config.prompts, unit="image", dynamic_ncols=True, mininterval=0.5) as bar:

        def cell(name: str, samples: int, chunks: Callable[[], Iterator[Chunk]], **more: Any) -> Cell:
            bar.set_description(name)
            path = Path(config.out) / "cells" / f"{name}.npz"
            key = cell_key(name=name, samples=samples, **facts, **more)
            made = Cell.load(path, key)
            if made is None:
                made = measure(name, chunks(), signs.items(samples), config.prompts, clients, bar.update)
                made.save(path, key)
            else:
                bar.update(samples * config.prompts)
            return made

        def sampled(name: str, policy: str, sampling: SamplingConfig, samples: int) -> Cell:
            samples = shots(sampling.temperature, samples)
            chunks = lambda: drawing.images(drawing.codes(policy, sampling, samples))  # noqa: E731
            return cell(name, samples, chunks, policy=stamps[policy], decoder=stamps["sft"], sampling=dataclasses.asdict(sampling))

        real = cell("real", 1, drawing.real_images)
        reconstruction = cell("reconstruction", 1, lambda: drawing.images(drawing.real_codes()), decoder=stamps["sft"])
        settings = {}
        for name, guidance in config.guidances().items():
            sft = sampled(f"{name}-sft", "sft", config.sampling(guidance), config.samples)
            rl = sampled(f"{name}-rl", "rl", config.sampling(guidance), config.rl_samples)
            sweep = {t: sampled(f"{name}-sft-t{t:g}", "sft", config.sampling(guidance, t), config.sweep_samples) for t in swept[name]}
            if config.temperature in config.temperatures:
                sweep[config.temperature] = sft
            settings[name] = Setting(reconstruction, sft, rl, {t: sweep[t] for t in sorted(sweep, reverse=True)})
        bar.set_description("measured")
    return Effect(config, signs, run, real, settings)
