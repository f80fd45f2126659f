"""For mypy alone: what ships fits the protocols that a user's own classes implement."""

from __future__ import annotations

from xomni_jax.core.config import Overrides, Section
from xomni_jax.data.codes import CodesConfig, CodesSource
from xomni_jax.data.files import FilesConfig, FilesSource
from xomni_jax.data.rendered import RenderedConfig, RenderedSource
from xomni_jax.data.sources import DataSection, ShuffledSource, Source
from xomni_jax.inference import InferenceStage
from xomni_jax.models.omnitokenizer import OmniTokenizerConfig
from xomni_jax.models.section import ModelSection
from xomni_jax.rl.grpo import GRPOStage
from xomni_jax.tokenizers.clips import ClipTokenizer
from xomni_jax.tokenizers.patches import PatchTokenizer
from xomni_jax.tokenizers.protocol import ImageTokenizer
from xomni_jax.training.decoder import DecoderStage
from xomni_jax.training.pretrain import PretrainStage, SFTStage
from xomni_jax.training.stage import Stage, TrainingStage
from xomni_jax.training.tokenizer import TokenizerStage
from xomni_jax.training.vq import VQStage

sources: list[Source] = [RenderedSource(RenderedConfig(), 0, 1)]
shuffled: list[ShuffledSource] = [FilesSource(FilesConfig(path="a", sizes=((8, 8),)), 0, 1), CodesSource(CodesConfig("a"), 0, 1)]
sections: list[Section] = [Overrides(int), DataSection("rendered", RenderedConfig()), ModelSection({})]
tokenizers: list[ImageTokenizer] = [PatchTokenizer("llamagen_vq", None, True), ClipTokenizer(OmniTokenizerConfig())]
stages: list[type[Stage]] = [InferenceStage]
training: list[type[TrainingStage]] = [TokenizerStage, VQStage, DecoderStage, PretrainStage, SFTStage, GRPOStage]
