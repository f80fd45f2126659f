"""CoRL (ULM-R1, 2505.17534): of one item an image is drawn and a question about the real one answered, and one reward counts for both.

Rewards that need no service stand beside those of services: the drawn image against the real one and against its prompt, as the policy
itself sees them, and whether the answer is right and has the wanted form.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.config import ConfigError, Count, Finite
from xomni_jax.core.preemption import StepRefused
from xomni_jax.core.program import Program, Programs, Work
from xomni_jax.models import work
from xomni_jax.models.transformer import ARConfig, ARTransformer
from xomni_jax.models.vocab_heads import select
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.text_metrics import fold, normalise
from xomni_jax.rl.grpo import GRPOStage
from xomni_jax.rl.methods.passes import PassesRollouts, PassesRun
from xomni_jax.rl.methods.texts import check_text_head, folded, text_spec, tokenizer_of
from xomni_jax.rl.prompts import all_prompts
from xomni_jax.rl.rollouts import Drawn
from xomni_jax.rl.trajectory import Credit, Passes, Trajectory, check_credit
from xomni_jax.sampling.logits import GREEDY
from xomni_jax.sampling.programs import RolloutShape, text_program
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sampling.segments import Prompts, Segment, SegmentSpec, append, image_spec
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import whole
from xomni_jax.training.pretrain import encode_images

KINDS = ("image", "answer")


@dataclasses.dataclass(frozen=True)
class OwnWeights:
    """Weights of the rewards that need no service; one of weight 0 is neither computed nor reported.

    Attributes:
      perceptual: mean cosine between the semantics of the drawn and of the real image's codes, place by place
      recaption: F1 of the words of the prompt and of the policy's description of the drawn image
      matching: how well the tokens of the image and of the prompt find each other in the policy's last hidden states
      accuracy: 1 where the answer is right
      format: 1 where it has the form `answers.form`
    """

    perceptual: Finite = 1.0
    recaption: Finite = 1.0
    matching: Finite = 1.0
    accuracy: Finite = 0.8
    format: Finite = 0.8


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """Answers to the questions of the items, and descriptions.

    Attributes:
      length: most tokens of an answer, and of a description
      prompt_length: tokens that a question is padded to, with all that surrounds it but the codes of its image; a longer one is an error
      form: regular expression of a whole answer; its first group is what must be right
      description: question about the drawn image, answered greedily, for the reward recaption
    """

    length: Count = 256
    prompt_length: Count = 128
    form: str = r"<think>.*</think>\s*<answer>(.*)</answer>"
    description: str = "Describe the image."

    def __post_init__(self):
        try:
            groups = re.compile(self.form).groups
        except re.error as error:
            raise ValueError(f"form={self.form!r} is no regular expression ({error})") from None
        if groups < 1:
            raise ValueError(f"form={self.form!r} has no group in parentheses, which marks what must be right")


@dataclasses.dataclass(frozen=True)
class CoRLRun(PassesRun):
    """GRPO of images and answers. The segments of `credit` are image and answer.

    Attributes:
      own: weights of the rewards that need no service, beside those of config.rewards
      answers: how questions are answered
    """

    stage: str = "corl"
    run_dir: str = "runs/corl"
    credit: Credit = tuple(("total", kind, 1.0) for kind in KINDS)
    own: OwnWeights = OwnWeights()
    answers: AnswerConfig = AnswerConfig()

    def __post_init__(self):
        super().__post_init__()
        check_credit(self.credit, ("total",), KINDS)
        if not any([*vars(self.own).values(), *(reward.weight for reward in self.rewards.values())]):
            raise ConfigError("config.own and config.rewards: all weights are 0; give at least one reward a weight")


# ---- rewards ----
def token_matching(image_BTD: jax.Array, text_BSD: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Text-image matching [B]: the mean over image tokens of the largest cosine to a text token, and the reverse, halved (R_TIM)."""
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)  # noqa: E731
    cosine_BTS = jnp.einsum("BTD,BSD->BTS", unit(image_BTD.astype(jnp.float32)), unit(text_BSD.astype(jnp.float32)))
    of_image_B = jnp.where(mask_BS[:, None], cosine_BTS, -jnp.inf).max(-1).mean(-1)
    of_text_B = jnp.where(mask_BS, cosine_BTS.max(1), 0.0).sum(-1) / mask_BS.sum(-1)
    return (of_image_B + of_text_B) / 2


def word_f1(wanted: str, found: str) -> float:
    """F1 of two texts as bags of words, from 0 to 1."""
    bags = [Counter(re.findall(r"\w+", fold(text))) for text in (wanted, found)]
    both, total = (bags[0] & bags[1]).total(), bags[0].total() + bags[1].total()
    return 2 * both / total if both else 0.0


def answer_scores(form: str, answer: str, expected: str) -> tuple[float, float]:
    """(whether the answer is right, whether it has the form), each 0 or 1."""
    found = re.fullmatch(form, answer.strip(), re.DOTALL)
    return float(found is not None and normalise(found[1] or "") == normalise(expected)), float(found is not None)


# ---- programs ----
def answer_spec(run: CoRLRun, stop: int) -> SegmentSpec:
    """How an answer is drawn."""
    return text_spec("answer", run.answers.length, run.sampling, stop)


def abstract_batch(run: CoRLRun, ar: ARConfig, grid: tuple[int, int], mesh: Mesh) -> Passes:
    """Shapes of all rollouts of a step, on the mesh: the images, and the answers after the codes of the real ones."""
    image = GRPOStage.abstract_batch(run, ar, grid, mesh)
    rows = lambda dtype, *shape: abstract.rows(mesh, (image.ok[0].shape[0], *shape), dtype)
    L, spec = run.answers.length, answer_spec(run, tokenizer_of(run.init_from).end_of_turn)
    answer = Segment(rows(jnp.int32, L), rows(jnp.int32), rows(jnp.float32, L), None, "text", spec)
    prompts = rows(jnp.int32, grid[0] * grid[1] + run.answers.prompt_length), rows(jnp.int32)
    return Passes((image, Trajectory(prompts, (answer,), None, image.advantage, image.ok)))


def own_programs(run: CoRLRun, net: ARTransformer, grid: tuple[int, int], weights: Any, mesh: Mesh) -> dict[str, Program]:
    """The programs beside those that draw images: answers, descriptions of drawn images, and how well these match their prompts."""
    P, R, T, c = run.batch_size // run.rollout.chunks, run.grpo.rollouts_per_prompt, grid[0] * grid[1], run.answers
    text, S = tokenizer_of(run.init_from), run.rollout.prompt_length
    before = len(text.image_prefix(*grid))
    spec, width, calls = answer_spec(run, text.end_of_turn), T + c.prompt_length, run.rollout.chunks
    out = {"answer": text_program(net, spec, weights, RolloutShape(P, R, width, c.length), calls, mesh)}
    if run.own.recaption:
        greedy = SegmentSpec("description", "text", c.length, GREEDY, spec.stop_ids)
        out["describe"] = text_program(net, greedy, weights, RolloutShape(P * R, 1, width, c.length), calls, mesh)
    if run.own.matching:

        def match(params, ids_BS, lengths_B, codes_BT):
            ids_BL, _ = append(ids_BS, lengths_B, Segment(codes_BT, kind="image"), net.cfg.vocab_size)
            hidden_BLD = net.apply({"params": params}, ids_BL)
            image_BTD = select(hidden_BLD, lengths_B[:, None] + jnp.arange(codes_BT.shape[1]))
            words_BS = jnp.arange(ids_BS.shape[1]) < lengths_B[:, None] - before
            return token_matching(image_BTD, hidden_BLD[:, : ids_BS.shape[1]], words_BS)

        ids = lambda *more: abstract.rows(mesh, (P * R, *more), jnp.int32)
        least = Work(forward=2.0 * P * R * (S + T) * net.cfg.n_layers * work.layer_weights(net.cfg), tokens=P * R * (S + T))
        about = f"hidden states of {P * R} rows of {S} + {T} tokens"
        out["match"] = Program(jax.jit(match), (weights, ids(S), ids(), ids(T)), about, least, uses=("sampler",), per_step=calls)
    return out


# ---- rollouts ----
@dataclasses.dataclass(frozen=True)
class PairSampler:
    """Draws images and answers of a chunk; between pieces of images the caller may stop.

    Attributes:
      image: draws the images. answer, describe, match: the programs of `own_programs`; None where its reward has no weight.
      run: the configuration. text: the tokenizer. grid: rows and columns of an image's codes.
    """

    image: Sampler
    answer: Callable[..., Segment]
    describe: Callable[..., Segment] | None
    match: Callable[..., jax.Array] | None
    run: CoRLRun
    text: MultimodalTokenizer
    grid: tuple[int, int]

    def __call__(self, params, ids_PS, lengths_P, keys_PR, negative, *more: Any) -> dict[str, Any]:
        """What `Sampler` returns, and beside it passes, as `PassesRollouts` wants them, and of each rollout [B] on the host: answers,
        descriptions, matching.

        Args:
          more: the prompts of the answers, without which there are images alone, and what is called between pieces of images.
        """
        *asked, between = more
        out, (P, R) = self.image(params, ids_PS, lengths_P, keys_PR, negative, between), keys_PR.shape
        if not asked:
            return out
        between()
        spec = image_spec(out["codes"].shape[2], self.run.sampling)
        image = Segment(out["codes"], None, out["logp"], out["sampling_mask"], "image", spec).rows()
        answer = self.answer(params, *asked[0], folded(keys_PR, out["codes"].shape[2])).rows()
        repeated = lambda rows: rows and tuple(np.repeat(x, R, axis=0) for x in rows)  # noqa: E731
        everywhere, prompts = (np.ones(P * R, bool),), repeated((ids_PS, lengths_P))
        first = Trajectory(prompts, (image,), repeated(negative), (), everywhere)
        out |= {"passes": [first, Trajectory(repeated(asked[0]), (answer,), None, (), everywhere)], "answers": self._read(answer)}
        if self.describe is not None:
            codes = [c.reshape(self.grid) for c in whole(image.ids)]
            shown = questions(self.text, codes, [self.run.answers.description] * len(codes), self.run.answers)
            out["descriptions"] = self._read(self.describe(params, *shown, keys_PR.reshape(-1, 1)).rows())
        if self.match is not None:
            out["matching"] = whole(self.match(params, *prompts, image.ids))
        return out

    def _read(self, text: Segment) -> list[str]:
        return [self.text.decode_text(ids[:n]) for ids, n in zip(whole(text.ids), whole(text.lengths), strict=True)]


def questions(text: MultimodalTokenizer, codes: Sequence[np.ndarray], asked: Sequence[str], cfg: AnswerConfig) -> Prompts:
    """(ids [B, S], lengths [B]) of questions about images, codes [Y, X] each. StepRefused: one is too long."""
    rows = [text.understanding_prompt(c, q) for c, q in zip(codes, asked, strict=True)]
    width = codes[0].size + cfg.prompt_length
    longest = max(range(len(rows)), key=lambda n: len(rows[n]))
    if len(rows[longest]) > width:
        raise StepRefused(
            f"question {asked[longest]!r} has {len(rows[longest]) - codes[0].size} tokens beside the codes of its image; raise "
            f"config.answers.prompt_length (now {cfg.prompt_length})"
        )
    return pad_prompts(rows, width)


@dataclasses.dataclass(frozen=True)
class PairRollouts(PassesRollouts):
    """Rollouts of images and answers. Targets hold `pair` beside what services are told: question, answer, codes of the real image."""

    def inputs(self, prompts: Sequence[str], targets: Sequence[dict], keys_PR: jax.Array) -> tuple[Any, ...]:
        """And the prompts of the answers."""
        pairs = [target["pair"] for target in targets]
        asked = questions(self.model.tokenizer, [pair["codes"] for pair in pairs], [pair["question"] for pair in pairs], self.run.answers)
        return *super().inputs(prompts, targets, keys_PR), asked

    def questions(self, prompts: Sequence[str], targets: Sequence[dict], *own: Any) -> tuple[list[Item], Any, Any]:
        """As without answers."""
        return super().questions(prompts, [{n: v for n, v in t.items() if n != "pair"} for t in targets], *own)

    def draw(self, params: Any, prompts: Sequence[str], targets: Sequence[dict], *others: Any) -> Drawn:
        """And the rewards that need no service."""
        drawn = super().draw(params, prompts, targets, *others)
        pairs = [target["pair"] for target in targets for _ in range(self.group)]
        joined = {
            name: [x for m in drawn.made for x in m[name]] for name in ("answers", "descriptions", "matching") if name in drawn.made[0]
        }
        told = [answer_scores(self.run.answers.form, a, pair["answer"]) for a, pair in zip(joined["answers"], pairs, strict=True)]
        own = {"accuracy": [right for right, _ in told], "format": [formed for _, formed in told], "matching": joined.get("matching")}
        if "descriptions" in joined:
            wanted = [prompt for prompt in prompts for _ in range(self.group)]
            own["recaption"] = [word_f1(*texts) for texts in zip(wanted, joined["descriptions"], strict=True)]
        if self.run.own.perceptual:
            codes_PRT = np.concatenate([whole(m["codes"]) for m in drawn.made])
            real = self.model.semantics(np.stack([target["pair"]["codes"] for target in targets]))
            own["perceptual"] = np.concatenate(
                [_alike(self.model.semantics(c.reshape(-1, *self.grid)), r) for c, r in zip(codes_PRT, real)]
            )
        weights = {name: weight for name, weight in vars(self.run.own).items() if weight}
        scores = drawn.scores | {name: [Score(float(value)) for value in own[name]] for name in weights}
        factors = {name: np.full((len(prompts), 1), weight) for name, weight in weights.items()}
        return drawn._replace(scores=scores, weights=drawn.weights | factors)


@jax.jit
def _alike(drawn_BYXC: jax.Array, real_YXC: jax.Array) -> jax.Array:
    """Mean cosine [B] of semantics, place by place."""
    a, b = drawn_BYXC.astype(jnp.float32), real_YXC.astype(jnp.float32)
    cosine_BYX = (a * b).sum(-1) / jnp.maximum(jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1), 1e-12)
    return cosine_BYX.mean((-1, -2))


class CoRLStage(GRPOStage):
    """CoRL, registered as a stage."""

    Config: ClassVar[type] = CoRLRun
    own_advantages: ClassVar[bool] = True
    own_rewards: ClassVar[bool] = True
    fields: ClassVar[tuple[str, ...]] = (*GRPOStage.fields, "image", "question", "answer")
    abstract_batch: ClassVar[Callable[..., Passes]] = staticmethod(abstract_batch)

    @classmethod
    def prompts(cls, cfg: CoRLRun, model: XOmni, rows: Sequence[int], examples: dict[str, Any]) -> dict[str, Any]:
        """And what is asked about the real images, whose codes replace them."""
        pairs = zip(examples["targets"], examples["question"], examples["answer"], strict=True)
        targets = [target | {"pair": {"question": question, "answer": answer}} for target, question, answer in pairs]
        batch = all_prompts(cfg, rows, examples | {"targets": targets})
        codes = encode_images(model, [[image] for image in examples["image"]], rows, cfg.batch_size)
        for target, (codes_YX,) in zip(batch["targets"], codes, strict=True):
            target["pair"]["codes"] = codes_YX
        return batch

    @classmethod
    def programs(cls, cfg: CoRLRun, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """As GRPO's; the text head must learn where answers are to."""
        made = super().programs(cfg, models, mesh, decoder_mesh)
        if any(segment == "answer" for _, segment, _ in cfg.credit):
            check_text_head(cfg, made, "answers")
        return made

    @classmethod
    def drawing(cls, cfg: CoRLRun, net: ARTransformer, grid: tuple[int, int], weights: Any, mesh: Mesh) -> dict[str, Program]:
        """The programs that draw a chunk's images, and those beside them."""
        return super().drawing(cfg, net, grid, weights, mesh) | own_programs(cfg, net, grid, weights, mesh)

    @classmethod
    def rollouts(
        cls, run: CoRLRun, programs: Mapping[str, Callable[..., Any]], model: XOmni, image_decoder: XOmni, **own: Any
    ) -> PairRollouts:
        """What draws, answers, decodes and scores."""
        image = super().rollouts(run, programs, model, image_decoder, **own).sampler
        sampler = PairSampler(image, programs["answer"], programs.get("describe"), programs.get("match"), run, model.tokenizer, own["grid"])
        return PairRollouts(model, image_decoder, sampler=sampler, run=run, kinds=KINDS, **own)
