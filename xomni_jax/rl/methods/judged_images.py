"""What Janus-Pro-R1 draws: an image, a verdict on it and another image, with a question and a prefix given between them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.config import Count, Finite, checked
from xomni_jax.core.program import Program
from xomni_jax.data.judged_signs import QUESTION
from xomni_jax.models import work
from xomni_jax.models.transformer import ARConfig, ARTransformer
from xomni_jax.rl.grpo import GRPORun, GRPOStage
from xomni_jax.rl.methods.texts import ended_at, folded, text_spec, tokenizer_of
from xomni_jax.rl.trajectory import Trajectory
from xomni_jax.sampling.engine import Engine, RolloutState
from xomni_jax.sampling.programs import placed_caches
from xomni_jax.sampling.sampler import segment_length
from xomni_jax.sampling.segments import Segment, SegmentSpec
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import whole

DRAWN = ("first", "verdict", "final")


@dataclasses.dataclass(frozen=True)
class VerdictConfig:
    """The policy's verdict on its first image.

    Attributes:
      question: that it answers; the verdict is the answer's first word, yes or no
      length: most tokens of an answer
      threshold: reward from which on an image shows what was asked for, so that yes is right
    """

    question: str = QUESTION
    length: Count = 32
    threshold: Finite = 0.5


@dataclasses.dataclass(frozen=True)
class JudgingRun(GRPORun):
    """GRPO of a policy that judges its first image.

    Attributes:
      verdict: how the first image is judged
    """

    verdict: VerdictConfig = VerdictConfig()


class Given(NamedTuple):
    """What is put between the drawn segments: ids of the question, of the second image's prefix, and of the end of a verdict."""

    question_L: np.ndarray
    prefix_L: np.ndarray
    end_of_turn: int

    @classmethod
    def of(cls, run: JudgingRun, grid: tuple[int, int]) -> Given:
        """For images with a grid of codes, by the tokenizer of `init_from`."""
        text = tokenizer_of(run.init_from)
        question = checked(lambda: text.conversation_prompt([("user", [run.verdict.question])]), "config.verdict.question")
        return cls(np.append(np.int32(text.eom), question), text.image_prefix(*grid), text.end_of_turn)

    def question(self, *rows: int) -> Segment:
        """After the first image."""
        return Segment(jnp.broadcast_to(jnp.asarray(self.question_L), (*rows, len(self.question_L))))

    def prefix(self, verdict: Segment) -> Segment:
        """After the verdict, which gets an end where it was cut off."""
        ended = ended_at(verdict, self.end_of_turn)[..., None]
        closed, open_ = (np.append(self.prefix_L, np.int32(0)), np.append(np.int32(self.end_of_turn), self.prefix_L))
        return Segment(jnp.where(ended, closed, open_), len(open_) - ended[..., 0].astype(jnp.int32))


def specs(run: JudgingRun, codes: int, stop: int) -> tuple[SegmentSpec, SegmentSpec, SegmentSpec]:
    """How the segments `DRAWN` are drawn."""
    return (
        SegmentSpec("first", "image", codes, run.sampling),
        text_spec("verdict", run.verdict.length, run.sampling, stop),
        SegmentSpec("final", "image", codes, run.sampling),
    )


def abstract_batch(run: JudgingRun, ar: ARConfig, grid: tuple[int, int], mesh: Mesh) -> Trajectory:
    """Shapes of all rollouts of a step, on the mesh."""
    one, given = GRPOStage.abstract_batch(run, ar, grid, mesh), Given.of(run, grid)
    rows = lambda dtype, *shape: abstract.rows(mesh, (one.ok[0].shape[0], *shape), dtype)
    (image,) = one.segments
    first, verdict, final = specs(run, image.ids.shape[1], given.end_of_turn)
    L, Q, S = verdict.length, len(given.question_L), len(given.prefix_L) + 1
    said = Segment(rows(jnp.int32, L), rows(jnp.int32), rows(jnp.float32, L), None, "text", verdict)
    between = Segment(rows(jnp.int32, Q)), said, Segment(rows(jnp.int32, S), rows(jnp.int32))
    return one.replace(
        segments=(image.replace(spec=first), *between, image.replace(spec=final)), advantage=one.advantage * 3, ok=one.ok * 3
    )


@dataclasses.dataclass(frozen=True)
class JudgingSampler:
    """Draws whole trajectories of a chunk; between pieces of them the caller may stop.

    Attributes:
      start, rollout, verdict, redraw: the programs of `drawing_programs`.
      specs: of the drawn segments. given: between them.
      piece: codes that a call draws.
      says: (ids [P, R, L], lengths [P, R]) -> 1 for yes, 0 for no, -1 for neither [P, R].
    """

    start: Callable[..., Any]
    rollout: Callable[..., Any]
    verdict: Callable[..., Any]
    redraw: Callable[..., Any]
    specs: tuple[SegmentSpec, SegmentSpec, SegmentSpec]
    given: Given
    piece: int
    says: Callable[[np.ndarray, np.ndarray], np.ndarray]

    @classmethod
    def of(
        cls, run: JudgingRun, programs: Mapping[str, Callable[..., Any]], tokenizer: MultimodalTokenizer, grid: tuple[int, int]
    ) -> JudgingSampler:
        """The loop over the functions of `drawing_programs`."""
        given, fns = Given.of(run, grid), (programs[name] for name in ("prefill", "rollout", "verdict", "redraw"))
        drawn = specs(run, grid[0] * grid[1], given.end_of_turn)
        return cls(*fns, drawn, given, segment_length(drawn[0].length, run.rollout.segment), functools.partial(says, tokenizer))

    def __call__(self, params, ids_PS, lengths_P, keys_PR, negative, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """{segments: all five [P, R, L], said, ended [P, R] on the host, codes: of the final images}."""
        prompt, state = self.start(params, ids_PS, lengths_P, keys_PR, negative)

        def image(draw: Callable[..., Any], state: Any, spec: SegmentSpec) -> tuple[Any, Segment]:
            parts: list[tuple[jax.Array | None, ...]] = []
            for first in range(0, spec.length, self.piece):
                if first:
                    between()
                state, part = draw(params, prompt, state, keys_PR, np.int32(first))
                parts.append((part.ids, part.logp, part.kept))
                if len(parts) > 1:  # the device always has the next one waiting
                    jax.block_until_ready(parts[-2])
            ids, logp, kept = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *parts)
            return state, Segment(ids, None, logp, kept, "image", spec)

        state, first = image(self.rollout, state, self.specs[0])
        state, verdict, prefix = self.verdict(params, prompt, per_row(state), keys_PR)
        said = self.says(whole(verdict.ids), whole(verdict.lengths))
        between()
        _, final = image(self.redraw, state, self.specs[2])
        return {
            "segments": (first, self.given.question(*keys_PR.shape), verdict, prefix, final),
            "said": said,
            "ended": whole(ended_at(verdict, self.given.end_of_turn)),
            "codes": jnp.where(jnp.asarray(said == 1)[..., None], first.ids, final.ids),
        }


def per_row(state: RolloutState) -> RolloutState:
    """The state with a column for each row, which texts of unequal length need; until then one number serves all."""
    column_PR = jnp.broadcast_to(state.cache.column, state.hidden_PRD.shape[:2])
    return state.replace(cache=state.cache.replace(column=column_PR))


def says(tokenizer: MultimodalTokenizer, ids_PRL: np.ndarray, lengths_PR: np.ndarray) -> np.ndarray:
    """Verdicts [P, R] by the first word of each answer: 1 for yes, 0 for no, -1 for neither."""
    ids = ids_PRL.reshape(-1, ids_PRL.shape[-1])
    words = [re.findall(r"\w+", tokenizer.decode_text(row[:n]))[:1] for row, n in zip(ids, lengths_PR.ravel(), strict=True)]
    return np.array([{"yes": 1, "no": 0}.get(word[0].lower() if word else "", -1) for word in words]).reshape(lengths_PR.shape)


def drawing_programs(run: JudgingRun, net: ARTransformer, grid: tuple[int, int], weights: Any, mesh: Mesh) -> dict[str, Program]:
    """The programs that draw a chunk's rollouts: the prompts, a piece of the first image, the verdict, a piece of the second."""
    engine, given, c = Engine(net), Given.of(run, grid), run.rollout
    first, verdict, final = specs(run, grid[0] * grid[1], given.end_of_turn)
    piece = segment_length(first.length, c.segment)
    P, R, S, sides = run.batch_size // c.chunks, run.grpo.rollouts_per_prompt, c.prompt_length, 1 + run.sampling.guided
    room = 2 * first.length + len(given.question_L) + verdict.length + len(given.prefix_L) + 1

    def start(params, ids_PS, lengths_P, keys_PR, negative):
        return engine.start(params, (ids_PS, lengths_P), keys_PR.shape[1], room, negative)

    def image(n: int, spec: SegmentSpec):
        spec = dataclasses.replace(spec, length=piece)

        def draw(params, prompt, state, keys_PR, at):
            return engine.sample(params, prompt, state, spec, folded(keys_PR, n), spec.sampling.truncates, at)

        return jax.jit(draw, donate_argnums=2)

    def judge(params, prompt, state, keys_PR):
        state = engine.extend(params, prompt, state, given.question(*keys_PR.shape))
        state, said = engine.sample(params, prompt, state, verdict, folded(keys_PR, 1))
        prefix = given.prefix(said)
        return engine.extend(params, prompt, state, prefix), said, prefix

    # ---- programs ----
    start, judge, keys = jax.jit(start), jax.jit(judge, donate_argnums=2), abstract.keys(mesh, (P, R), "batch")
    ids = lambda *more: abstract.rows(mesh, (P, *more), jnp.int32)
    prompts = (weights, ids(S), ids(), keys, (ids(S), ids()) if run.sampling.guided else None)
    draws = [image(n, spec) for n, spec in ((0, first), (2, final))]
    with jax.set_mesh(mesh):
        cache, before = placed_caches(jax.eval_shape(start, *prompts), mesh)
        drawn = placed_caches(jax.eval_shape(per_row, before), mesh)
        after = placed_caches(jax.eval_shape(judge, weights, cache, drawn, keys)[0], mesh)
    at, about = abstract.array(mesh, (), jnp.int32), f"of {P} prompts x {R} rollouts of {S} + {room} tokens"
    least = functools.partial(work.rollout, net.cfg, P, R, S, room, sides=sides, mesh=mesh.shape)

    def program(fn: Callable[..., Any], what: str, tokens: int, state: Any, *more: Any, calls: int = 1, **known: int) -> Program:
        needed = dataclasses.replace(least(segment=tokens), **known)
        args = (weights, cache, state, keys, *more)
        return Program(fn, args, f"{what} {about}", needed, uses=("sampler",), per_step=c.chunks * calls, state=state)

    pieces = first.length // piece
    return {
        "prefill": Program(
            start, prompts, f"{P * sides} prompts of {S} tokens", work.prefill(net.cfg, P, S, sides), uses=("sampler",), per_step=c.chunks
        ),
        "rollout": program(draws[0], f"{piece} codes", piece, before, at, calls=pieces),
        "verdict": program(judge, "verdicts", 1, drawn, open_loops=1),
        "redraw": program(draws[1], f"{piece} further codes", piece, after, at, calls=pieces),
    }  # fmt: skip
