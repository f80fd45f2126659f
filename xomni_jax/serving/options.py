"""The flags of `xomni serve`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from xomni_jax.core.http import HTTPOptions


@dataclass(frozen=True, kw_only=True)
class FrontOptions(HTTPOptions):
    """Flags of `xomni serve --front`, and of every service.

    Attributes:
      max_body_bytes: of one request
      deadline_seconds: after which a request is given up
    """

    max_body_bytes: int = 16 << 20
    deadline_seconds: float = 600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(*(field.name for field in fields(self)))


@dataclass(frozen=True, kw_only=True)
class ServeOptions(FrontOptions):
    """Flags of `xomni serve`.

    Attributes:
      slots: images, or answers, that are drawn at a time; all models have so many for each size in use
      segment: codes between which requests join, images are shown, and those of clients who have gone end
      max_lanes: sizes and kinds of requests that are held in memory at a time
      max_queue: images and answers that wait; a request beyond it is answered 429
      max_images: of one request
      max_prompt_tokens: of one prompt, or of a conversation without its images
      max_answer_tokens: of one answer
      max_upload_pixels: of one uploaded image
      keep_images: images that are kept in memory for response_format url
    """

    slots: int = 16
    segment: int = 64
    max_lanes: int = 8
    max_queue: int = 64
    max_images: int = 16
    max_prompt_tokens: int = 512
    max_answer_tokens: int = 512
    max_upload_pixels: int = 1 << 24
    keep_images: int = 256
