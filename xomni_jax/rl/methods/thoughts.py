"""What TwiG draws (2511.16671): bands of rows of one image, each after a thought, under a text prefix that is rewritten each time.

Every pass is a prompt and one drawn segment. With the thoughts 1..k so far, a band k follows `prompt, thoughts, image prefix, bands before
it`; a thought follows `prompt, thoughts before it, the bands so far as a closed image, a question`. So what a later thought says changes
nothing in the codes of earlier bands.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.config import ConfigError, Count, Finite, checked
from xomni_jax.core.program import Program
from xomni_jax.models.transformer import ARConfig, ARTransformer
from xomni_jax.rl.methods.passes import PassesRun
from xomni_jax.rl.methods.texts import ended_at, folded, text_spec, tokenizer_of
from xomni_jax.rl.trajectory import Passes, Trajectory
from xomni_jax.sampling.programs import RolloutShape, sampler_programs, text_program
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sampling.segments import Segment, SegmentSpec, image_spec
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import whole

KINDS = ("thought", "band", "reflection", "redraw")


@dataclasses.dataclass(frozen=True)
class ThoughtConfig:
    """Thoughts while an image is drawn.

    Attributes:
      bands: K, of rows of codes, into which an image is divided from top to bottom; their number divides that of its rows
      question: that a thought answers
      length: most tokens of a thought
      given: the thoughts, one for each band; empty: they are drawn
      reflection: question after each band, answered by a score from 0 to 100 and a better thought; empty: it is not asked
      threshold: score below which the band is drawn once more, with the reflection in place of its thought
    """

    bands: Count = 3
    question: str = "What should the next part of the image show?"
    length: Count = 32
    given: tuple[str, ...] = ()
    reflection: str = ""
    threshold: Finite = 90.0

    def __post_init__(self):
        if self.given and len(self.given) != self.bands:
            raise ValueError(f"given has {len(self.given)} thoughts for bands={self.bands}; give one for each band")


@dataclasses.dataclass(frozen=True)
class ThinkingRun(PassesRun):
    """GRPO of a policy that thinks before each band of rows that it draws.

    Attributes:
      thoughts: what is thought
    """

    thoughts: ThoughtConfig = ThoughtConfig()


class Pass(NamedTuple):
    """A kind of pass: its name, what is drawn in it, tokens of its padded prompts, whether guidance steers it."""

    kind: str
    spec: SegmentSpec
    width: int
    guided: bool


@dataclasses.dataclass(frozen=True)
class Script:
    """The passes of a rollout, and the prompts of each.

    Attributes:
      text: the tokenizer. shape: rows and columns of a band.
      prefix, between: ids in front of an image's codes, and of each thought. asks: ids in front of a thought, and of a reflection.
      given: ids of the given thoughts.
      passes: in their order, band after band.
    """

    text: MultimodalTokenizer
    shape: tuple[int, int]
    prefix: np.ndarray
    between: np.ndarray
    asks: Mapping[str, np.ndarray]
    given: tuple[np.ndarray, ...]
    passes: tuple[Pass, ...]

    @classmethod
    def of(cls, run: ThinkingRun, grid: tuple[int, int]) -> Script:
        """For images with a grid of codes, by the tokenizer of `init_from`."""
        c, text = run.thoughts, tokenizer_of(run.init_from)
        if grid[0] % c.bands:
            raise ConfigError(f"config.thoughts.bands={c.bands} does not divide the {grid[0]} rows of an image's codes; use a divisor")
        shape = grid[0] // c.bands, grid[1]
        asked = {"thought": "" if c.given else c.question, "reflection": c.reflection}
        turn = lambda words: text.conversation_prompt([("user", [words])])  # noqa: E731
        asks = checked(lambda: {kind: turn(words) for kind, words in asked.items() if words}, "config.thoughts")
        given = checked(lambda: tuple(text.encode_text(words)[: c.length] for words in c.given), "config.thoughts.given")
        between, codes, passes = text.encode_text("\n"), math.prod(shape), []
        band = image_spec(codes, run.sampling)
        for k in range(c.bands):
            for kind in KINDS:
                if kind in asks or kind == "band" or kind == "redraw" and "reflection" in asks:
                    thoughts, shown, ask = k + (kind != "thought"), k + (kind == "reflection"), asks.get(kind, ())
                    width = run.rollout.prompt_length + thoughts * (len(between) + c.length) + shown * codes + bool(len(ask)) + len(ask)
                    spec = text_spec(kind, c.length, run.sampling, text.end_of_turn) if len(ask) else band
                    passes.append(Pass(kind, spec, width, spec.sampling.guided))
        return cls(text, shape, text.image_prefix(*grid), between, asks, given, tuple(passes))

    def prompts(self, one: Pass, texts: Sequence[np.ndarray], thoughts: Sequence[Sequence[np.ndarray]], codes_BT: np.ndarray) -> Any:
        """(ids [B, S], lengths [B]) of a pass after these texts, thoughts and codes so far, and its negative prompts with guidance."""
        rows, images, ask = [], codes_BT + self.text.vocab_size, self.asks.get(one.kind)
        for text, own, codes_T in zip(texts, thoughts, images, strict=True):
            row = [text, *(part for thought in own for part in (self.between, thought))]
            if ask is None or len(codes_T):
                row += [self.prefix, codes_T]
            if ask is not None:
                row += [[self.text.eom] * bool(len(codes_T)), ask]
            rows.append(np.concatenate(row).astype(np.int32))
        negative = [np.concatenate([self.prefix, codes_T]) for codes_T in images]
        return pad_prompts(rows, one.width), pad_prompts(negative, one.width) if one.guided else None


def abstract_batch(run: ThinkingRun, ar: ARConfig, grid: tuple[int, int], mesh: Mesh) -> Passes:
    """Shapes of all rollouts of a step, on the mesh."""
    B = run.batch_size * run.grpo.rollouts_per_prompt
    rows = lambda dtype, *shape: abstract.rows(mesh, (B, *shape), dtype)

    def shapes(one: Pass) -> Trajectory:
        L, image = one.spec.length, one.spec.kind == "image"
        kept = rows(jnp.uint8, L, -(-ar.image_vocab_size // 8)) if one.spec.sampling.truncates else None
        drawn = Segment(rows(jnp.int32, L), None if image else rows(jnp.int32), rows(jnp.float32, L), kept, one.spec.kind, one.spec)
        prompts = rows(jnp.int32, one.width), rows(jnp.int32)
        return Trajectory(prompts, (drawn,), prompts if one.guided else None, (rows(jnp.float32),), (rows(jnp.bool_),))

    return Passes(tuple(map(shapes, Script.of(run, grid).passes)))


def drawing_programs(run: ThinkingRun, net: ARTransformer, grid: tuple[int, int], weights: Any, mesh: Mesh) -> dict[str, Program]:
    """The programs that draw a chunk's passes, each row after a prompt of its own; those of a number are of that pass."""
    c, script, programs = run.rollout, Script.of(run, grid), dict[str, Program]()
    rows = run.batch_size // c.chunks * run.grpo.rollouts_per_prompt
    sampler = Sampler.make(net, script.shape, run.sampling, c.segment, return_mask=run.sampling.truncates)
    for n, one in enumerate(script.passes):
        shape = RolloutShape(rows, 1, one.width, one.spec.length)
        if one.spec.kind == "text":
            programs[f"text-{n}"] = text_program(net, one.spec, weights, shape, c.chunks, mesh)
        else:
            made = sampler_programs(sampler, net.cfg, weights, shape, one.guided, c.chunks, mesh)
            programs |= {f"{name}-{n}": program for name, program in made.items()}
    return programs


@dataclasses.dataclass(frozen=True)
class ThinkingSampler:
    """Draws all passes of a chunk; between pieces of them the caller may stop.

    Attributes:
      script: the passes. bands: draws those of bands. texts: by the number of the pass, the programs that draw texts.
      threshold: score below which a band is drawn again.
    """

    script: Script
    bands: Sampler
    texts: Mapping[int, Callable[..., Segment]]
    threshold: float

    @classmethod
    def of(cls, run: ThinkingRun, programs: Mapping[str, Callable[..., Any]], grid: tuple[int, int]) -> ThinkingSampler:
        """The loop over the functions of `drawing_programs`."""
        script = Script.of(run, grid)
        numbers = {kind: [n for n, one in enumerate(script.passes) if one.spec.kind == kind] for kind in ("image", "text")}
        first = numbers["image"][0]
        bands = Sampler.of(programs[f"prefill-{first}"], programs[f"rollout-{first}"], math.prod(script.shape), run.rollout.segment)
        return cls(script, bands, {n: programs[f"text-{n}"] for n in numbers["text"]}, run.thoughts.threshold)

    def __call__(self, params, ids_PS, lengths_P, keys_PR, negative, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """{codes: of the images [P, R, T], passes: prompts, drawn segment and negative prompts of each pass as a `Trajectory` whose ok
        tells which rows it counts for, scores: of the reflections [B] on the host, NaN where there is none}."""
        script, (P, R) = self.script, keys_PR.shape
        end, B = script.text.end_of_turn, P * R
        texts = [ids[: n - len(script.prefix)] for ids, n in zip(ids_PS, lengths_P, strict=True) for _ in range(R)]
        thoughts: list[list[np.ndarray]] = [[] for _ in texts]
        codes_BT, band_BT, passes, scores, redo_B = np.zeros((B, 0), np.int32), None, [], [], np.zeros(B, bool)
        for n, one in enumerate(script.passes):
            if one.kind in ("thought", "band") and band_BT is not None:
                codes_BT, band_BT = np.concatenate([codes_BT, band_BT], axis=1), None
            if one.kind == "band" and script.given:
                thoughts = [[*own, script.given[len(own)]] for own in thoughts]
            seen_BT = codes_BT if one.kind != "reflection" else np.concatenate([codes_BT, band_BT], axis=1)
            prompts, unwanted = script.prompts(one, texts, thoughts, seen_BT)
            keys_B1 = folded(keys_PR, n).reshape(B, 1)
            if n:
                between()
            if one.spec.kind == "text":
                drawn = self.texts[n](params, *prompts, keys_B1).rows()
                said = _words(drawn, end)
                if one.kind == "thought":
                    thoughts = [[*own, ids] for own, ids in zip(thoughts, said, strict=True)]
                else:
                    scores.append(np.array([score_of(script.text.decode_text(ids)) for ids in said]))
                    redo_B = scores[-1] < self.threshold
                    thoughts = [[*own[:-1], ids] if redo else own for own, ids, redo in zip(thoughts, said, redo_B, strict=True)]
            else:
                out = self.bands(params, *prompts, keys_B1, unwanted, between)
                drawn = Segment(out["codes"], None, out["logp"], out["sampling_mask"], "image", one.spec).rows()
                fresh = whole(drawn.ids)
                band_BT = fresh if one.kind == "band" else np.where(redo_B[:, None], fresh, band_BT)
            counts_B = redo_B if one.kind == "redraw" else np.ones(B, bool)
            passes.append(Trajectory(prompts, (drawn,), unwanted, (), (counts_B,)))
        codes_BT = np.concatenate([codes_BT, band_BT], axis=1)
        return {"codes": jnp.asarray(codes_BT.reshape(P, R, -1)), "passes": passes, "scores": scores}


def score_of(text: str) -> float:
    """The score from 0 to 100 with which a reflection begins, NaN where it begins with none."""
    found = re.match(r"\W*(\d{1,3})\b", text)
    return float(found[1]) if found and int(found[1]) <= 100 else math.nan


def _words(text: Segment, end: int) -> list[np.ndarray]:
    """Ids of texts [B, L] without their end."""
    lengths_B = whole(text.lengths) - whole(ended_at(text, end))
    return [ids[:n] for ids, n in zip(whole(text.ids), lengths_B, strict=True)]
