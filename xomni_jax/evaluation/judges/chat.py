"""A chat model that sees as a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from PIL import Image

from xomni_jax.evaluation.judges.preparation import ChatOptions, is_skipped
from xomni_jax.evaluation.suite import JudgeUnavailable, unreadable
from xomni_jax.rewards.chat.messages import ChatModel, ChatUnavailable, EncodedImage, Question, encoded
from xomni_jax.rewards.chat.replies import Completion, Unreadable, choose


def answered(
    model: ChatModel, text: str, max_tokens: int, room: int, image: EncodedImage | None = None, answers: Sequence[str] = ()
) -> str:
    """The answer of a model, without its thinking; one of `answers` if there are some.

    A reply that was cut is asked for again with `room` more tokens. Text of a model that turns out not to think is then taken as it
    was cut, as the official scorers do.

    Raises:
      JudgeUnavailable: the model does not answer.
      Unreadable: it refuses, ends within its thinking, or gives none of `answers`.
    """
    question = Question(text, (image,) if image else ())
    reply = _complete(model, question, max_tokens)
    if reply.cut and not (answers and reply.text and choose(reply.text, answers)):
        longer = _complete(model, question, max_tokens + room)
        reply = longer if longer.thought or answers or reply.text is None else reply
    if reply.text is None:
        used = f"the {max_tokens + room} tokens were used up by thinking, raise --thinking-tokens" if reply.cut else "it only thought"
        raise Unreadable(f"no answer: {used}")
    if not answers:
        return reply.text
    if (chosen := choose(reply.text, answers)) is None:
        raise Unreadable(f"none of {', '.join(answers)}: {reply.text[:200]}")
    return chosen


def _complete(model: ChatModel, question: Question, max_tokens: int) -> Completion:
    try:
        return model.complete(question, max_tokens)
    except ChatUnavailable as error:
        raise JudgeUnavailable(f"{error}; what is judged is kept, run the command again") from error


class ChatJudge:
    """Asks a chat model: the image, then the question's instruction. See Judge.

    A question may list the "answers" to choose from. A reply that cannot be read is {"unreadable": why}.
    """

    def __init__(self, model: ChatModel, options: ChatOptions = ChatOptions()):
        self._model, self._options, self.concurrency = model, options, options.concurrency
        self._threads = ThreadPoolExecutor(options.concurrency, thread_name_prefix="judge")
        self.name = model.name
        self.settings: dict[str, Any] = {"model": model.name, "temperature": 0, **model.settings}
        if options.image_format:
            self.settings["format"] = options.image_format

    def ask(self, images: Sequence[Image.Image | None], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is a string, or None for an image that is left out."""
        submit = self._threads.submit
        tasks = []
        for image, asked in zip(images, questions, strict=True):
            # Each image is encoded once for all its questions. This task comes first in the queue, so no reply waits for one behind it.
            files = {kind: submit(encoded, image, kind) for kind in set(map(self._kind, asked))} if image else {}
            tasks.append([submit(self._reply, image, question, files) for question in asked])
        try:
            return [[task.result() for task in of_image] for of_image in tasks]
        except JudgeUnavailable:
            started = [task for of_image in tasks for task in of_image if not task.cancel()]
            wait(started)  # so that nothing is asked any more when this returns
            raise

    def close(self) -> None:
        self._model.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _kind(self, question: Mapping[str, Any]) -> str:
        return self._options.image_format or question.get("format", "PNG")

    def _reply(self, image: Image.Image | None, question: Mapping[str, Any], files: Mapping[str, Any]) -> Any:
        if image and is_skipped(image, question):
            return None
        file = files[self._kind(question)].result() if image else None
        answers = question.get("answers", ())
        try:
            return answered(self._model, question["instruction"], question["max_tokens"], self._options.thinking_tokens, file, answers)
        except Unreadable as error:
            return unreadable(str(error))
