"""What reinforcement learning changed: SFT against RL on held-out prompts, with best-of-N, guidance and temperature in between.

The paper's claim (X-Omni, arXiv 2507.22058): one sample after RL beats SFT's best of N. Best-of-N picks with the reward that RL
trains on and knows the wanted text, so it is an oracle that nobody has when drawing; it bounds what choosing among SFT's
samples could give.

Every measurement is a run of the suite `HeldoutSigns` by the engine (`evaluation.run`); `summary` makes the report of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xomni_jax.checkpoint.store import checkpoint_hash
from xomni_jax.core.preemption import StopSignal
from xomni_jax.evaluation.grpo_run import GRPORun
from xomni_jax.evaluation.judges import RewardsJudge
from xomni_jax.evaluation.measurement import Measurement, measure
from xomni_jax.evaluation.run import EvalConfig, evaluate
from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.suites.rendered import HeldoutSigns, Signs, heldout_signs

if TYPE_CHECKING:
    from xomni_jax.pipeline import XOmni
    from xomni_jax.rewards.client import RewardClient

SERVICES = {"ocr": "ocr", "shapes": "shapes", "second": "tesseract"}  # role here -> scorer that must answer
SAMPLER_ROWS = 256  # images in one call of the sampler


@dataclass(frozen=True)
class EffectConfig:
    """What is compared, and how.

    Attributes:
      sft: model directory of the supervised model
      rl: model directory after GRPO, such as RUN/model; same tokenizer and decoder as the supervised model
      rl_run: the GRPO run with metrics.jsonl and config.json
      out: directory of the results, such as runs/demo
      prompts: held-out signs, no two alike
      samples: SFT samples per sign, the largest best-of-N
      rl_samples: RL samples per sign, averaged
      sweep_samples: SFT samples per sign and temperature of the sweep
      guidance: of the setting "guidance on"; off is always measured, and 1 measures nothing else
      size: pixels, height and width
      lengths: least and most characters of a sign
      seed: of signs, samples and decoder noise
      temperature: of all samples but those of the sweep
      top_k: keep the so many likeliest codes; 0: off
      top_p: keep the likeliest codes that hold this probability; 1: off
      min_p: drop codes below this share of the likeliest one's probability; 0: off
      temperatures: of the sweep over SFT; 0 is greedy
      chunk: images decoded at a time
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


@dataclass(frozen=True)
class Setting:
    """The measurements of one guidance setting; `sweep` holds SFT by temperature, highest first."""

    reconstruction: Measurement
    sft: Measurement
    rl: Measurement
    sweep: dict[float, Measurement]


@dataclass(frozen=True)
class Effect:
    """Everything measured: the report is made of this."""

    config: EffectConfig
    signs: Signs
    run: GRPORun
    real: Measurement
    settings: dict[str, Setting]


@contextlib.contextmanager
def open_services(urls: Mapping[str, str]) -> Iterator[tuple[dict[str, RewardClient], dict[str, str]]]:
    """Clients by role and the versions of what answers. `urls`: "ocr" (needed), "shapes", "second"; several URLs by commas.

    Raises:
      SuiteError: no OCR service is named.
      RewardServiceError: a service does not answer or serves something else.
    """
    from xomni_jax.rewards.client import RewardClient

    if not urls.get("ocr"):
        raise SuiteError(
            "no OCR service is given; start one with: xomni serve-reward ocr --port 8001, and pass --ocr http://127.0.0.1:8001"
        )
    with contextlib.ExitStack() as stack:
        clients, versions = {}, {}
        for role, scorer in SERVICES.items():
            if urls.get(role):
                clients[role] = stack.enter_context(RewardClient(scorer, urls[role].split(","), max_wait=900.0))
                versions[role] = clients[role].versions()
        yield clients, versions


class PolicySampler:
    """Two models that differ in the transformer alone, in one model object: they share the decoder and all compiled programs.

    Raises:
      SuiteError: another part of the two models differs.
    """

    def __init__(self, sft: str | Path, rl: str | Path):
        from xomni_jax.pipeline import XOmni
        from xomni_jax.sampling.decoder import DECODER_COMPONENTS

        self.model, self._rl = XOmni(sft), XOmni(rl)
        models = (self.model, self._rl)
        for part in ("siglip_vq", *DECODER_COMPONENTS):
            ours, theirs = ((model.config(part), model.description["components"][part].get("note")) for model in models)
            if ours != theirs:
                raise SuiteError(
                    f"{rl}: its {part} is not that of {sft}, so a difference between the two need not come from the policy; "
                    "compare with the model that the run started from"
                )
        if self.model.config("transformer") != self._rl.config("transformer"):
            raise SuiteError(f"{rl}: its transformer has other sizes than that of {sft}; compare with the model that the run started from")

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return {"sft": self.model.params("transformer"), "rl": self._rl.params("transformer")}

    def with_policy(self, policy: str) -> XOmni:
        """The model with the transformer of "sft" or "rl"."""
        self.model.set_params("transformer", self._params[policy])
        return self.model


def measure_all(config: EffectConfig, run: GRPORun, judge: RewardsJudge) -> Effect:
    """All measurements of the comparison."""
    signs = heldout_signs(config.prompts, config.size, config.lengths, config.seed)
    sampler = PolicySampler(config.sft, config.rl)
    sampler.model.check_prompts(signs.captions)
    with _Study(config, signs, sampler, judge) as study:
        real, reconstruction = study.real(), study.drawn("reconstruction", "sft", 1, reconstruct=True)
        made = {}
        for name, guidance in {"guidance_off": 1.0, **({"guidance_on": config.guidance} if config.guidance != 1 else {})}.items():
            sft = study.drawn(f"{name}-sft", "sft", config.samples, guidance)
            rl = study.drawn(f"{name}-rl", "rl", config.rl_samples, guidance)
            swept = [t for t in config.temperatures if t != config.temperature]
            sweep = {t: study.drawn(f"{name}-sft-t{t:g}", "sft", config.sweep_samples, guidance, t) for t in swept}
            made[name] = sft, rl, sweep
        settings = {}
        for name, (sft, rl, sweep) in made.items():
            sft, sweep = sft(), {t: found() for t, found in sweep.items()}
            if config.temperature in config.temperatures:
                sweep[config.temperature] = sft
            settings[name] = Setting(reconstruction(), sft, rl(), {t: sweep[t] for t in sorted(sweep, reverse=True)})
        return Effect(config, signs, run, real(), settings)


class _Study(contextlib.AbstractContextManager):
    """Makes measurements, each in a run directory of its own below OUT/cells; a thread has images scored while the next ones are drawn.

    `real` and `drawn` return a function that waits for the measurement.
    """

    def __init__(self, config: EffectConfig, signs: Signs, sampler: PolicySampler, judge: RewardsJudge):
        self.config, self.signs, self.sampler, self.judge = config, signs, sampler, judge
        self._stop, self._pool, self._scoring = StopSignal(), ThreadPoolExecutor(1), list[Future]()
        self._decides = {
            "signs": [config.prompts, config.size, config.lengths, config.seed],
            "decode": dataclasses.asdict(sampler.model.decode_config),
            "services": judge.settings,
        }
        self._stamps = {"sft": checkpoint_hash(config.sft), "rl": checkpoint_hash(config.rl)}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.requested = kind is not None
        self._pool.shutdown(cancel_futures=kind is not None)

    def real(self) -> Callable[[], Measurement]:
        """The real images."""
        suite = HeldoutSigns(self.signs, 1)
        out = self._directory("real")
        for item in suite.load(out):
            suite.save(out / "images", item, [item.image()])
        return self._scored(EvalConfig(suite, out, report=False))

    def drawn(
        self,
        name: str,
        policy: str,
        samples: int,
        guidance: float = 1.0,
        temperature: float | None = None,
        reconstruct: bool = False,
    ) -> Callable[[], Measurement]:
        """Images by a policy; `reconstruct`: the real images passed through the codes."""
        from xomni_jax.inference import InferenceConfig

        c = self.config
        temperature = c.temperature if temperature is None else temperature
        samples = 1 if temperature == 0 else samples  # greedy samples of a prompt are all the same image
        per_call = max(k for k in range(1, samples + 1) if samples % k == 0 and (k == 1 or k * c.prompts <= SAMPLER_ROWS))
        how = {"temperature": temperature, "top_k": c.top_k, "top_p": c.top_p, "min_p": c.min_p, "guidance": guidance}
        inference = InferenceConfig(model=c.rl if policy == "rl" else c.sft, **how, batch=c.prompts * per_call, decode_batch=c.chunk)
        out = self._directory(name, samples=samples, policy=self._stamps[policy], decoder=self._stamps["sft"], sampling=how)
        config = EvalConfig(
            HeldoutSigns(self.signs, samples),
            out,
            inference=inference,
            seed=c.seed,
            repeats_per_call=per_call,
            reconstruct=reconstruct,
            reencode=True,
            report=False,
        )
        if not (out / "results.json").is_file():
            for scoring in self._scoring:
                if scoring.done():
                    scoring.result()  # a broken service stops the drawing, too
            model = (lambda: self.sampler.model) if reconstruct else (lambda: self.sampler.with_policy(policy))
            evaluate(dataclasses.replace(config, phase="generate"), model, stop=self._stop)
        return self._scored(config)

    def _directory(self, name: str, **decides: Any) -> Path:
        """The directory of a measurement, emptied when something that decides the measurement has changed."""
        out = Path(self.config.out) / "cells" / name
        key = json.dumps(self._decides | decides, sort_keys=True)
        if not (out / "key.json").is_file() or (out / "key.json").read_text() != key:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            (out / "key.json").write_text(key)
        return out

    def _scored(self, config: EvalConfig) -> Callable[[], Measurement]:
        self._scoring.append(self._pool.submit(self._score, dataclasses.replace(config, phase="score")))
        return self._scoring[-1].result

    def _score(self, config: EvalConfig) -> Measurement:
        results = config.out / "results.json"
        if not results.is_file():  # what was scored before an interruption may be failures of a service that is fixed now
            shutil.rmtree(config.out / "judged", ignore_errors=True)
        run = evaluate(config, judge=self.judge, stop=self._stop).run
        outputs, judged = run.outputs(), run.judged()
        images = np.stack([[np.asarray(image) for image in run.suite.open(run.path / "images", item)] for item in run.items])
        replies_PR = [[reply for (reply,) in judged[item.id]["replies"]] for item in run.items]
        agreement = [outputs[item.id]["agreement"] for item in run.items] if config.reencode else None
        try:
            return measure(run.path.name, images, replies_PR, agreement)
        except SuiteError:
            results.unlink()
            raise
