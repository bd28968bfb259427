"""A loaded model that answers the requests of lmms-eval, pruned or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from vtprune.engine.plan import find_adapter
from vtprune.errors import UnsupportedError
from vtprune.eval.lmms_call import Reply, Took, call
from vtprune.eval.lmms_prompts import Messages, Prompter, Stops, cut, group_of, settings_for

# Requests beyond the last one, by which lmms-eval makes all ranks have equally many.
PADDING = "__padding_only__"
ROUNDS = 100  # of a conversation, by which it must have ended
Wrapping = Callable[[int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Batch:
    """A batch that was answered: the number of its first document, its size and its times."""

    first: int
    size: int
    took: Took


class Chat(lmms):
    """Answers in batches of requests with equal settings, each in the order it came in.

    Attributes:
        wrapping: called with the number of a batch's first document; within what it returns the
            model is pruned. By default it is not.
        blind: whether images and videos are kept from the model.
        replies: by task and document what was answered last.
        batches: those that were answered, in their order.
        advance: told the number of requests that were just answered.
    """

    is_simple = False

    def __init__(
        self, model: Any, processor: Any, batch_size: int = 1, options: dict[str, Any] | None = None
    ) -> None:
        """Raises VTPruneError where the model or its processor cannot be asked.

        Args:
            options: of images and videos, as ``Prompter`` takes them.
        """
        super().__init__()
        self.batch_size = batch_size
        self._held = (model,)  # a module among the attributes would be deleted by lmms-eval
        self.adapter = find_adapter(model)
        self.prompter = Prompter(processor, self.adapter, options)
        self.wrapping: Wrapping = lambda first: nullcontext()
        self.blind = False
        self.advance: Callable[[int], Any] = lambda n: None
        self.forget()

    def forget(self) -> None:
        """Lets go of the replies and batches so far."""
        self.replies: dict[tuple[str, Any], Reply] = {}
        self.batches: list[Batch] = []

    @property
    def model(self) -> Any:
        return self._held[0]

    @property
    def device(self) -> torch.device:
        """Where tensors live that ranks exchange."""
        return self.model.device

    def clean(self) -> None:
        """Gives memory back that the GPU holds in reserve. The model may be asked again."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:  # type: ignore[override]
        """Answers requests, in their order; padding ones are not run, and their answers are empty.

        A stop ends an answer, but for the empty line that lmms-eval adds by itself.
        """
        results = [GenerationResult("") for _ in requests]
        done: list[tuple[Reply, Took, int]] = []
        for places in self._batches(requests):
            args = [requests[place].args for place in places]
            talks = [ask(self._doc(*where)) for _, ask, _, *where in args]
            names = [(task, doc_id) for *_, doc_id, task, _ in args]
            replies, took = self._answer(talks, args[0][2], names)
            for place, reply in zip(places, replies, strict=True):
                results[place] = GenerationResult(reply.text, TokenCounts(reply.prompt, reply.new))
            done += [(reply, took, len(places)) for reply in replies]
            self.advance(len(places))
        if done:
            _log(done)
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:  # type: ignore[override]
        """Answers each round of a conversation in turn; the task says what follows an answer."""
        answers = []
        for request in requests:
            answers.append(self._rounds(request))
            self.advance(1)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> Any:  # type: ignore[override]
        """Raises UnsupportedError: lmms-eval asks chat models for texts alone."""
        raise UnsupportedError(
            "Tasks of the types loglikelihood and multiple_choice are not for chat models in "
            "lmms-eval. Choose one whose output_type is generate_until."
        )

    def _doc(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Yields the places of requests that go through the model together."""
        groups: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            if not request.metadata.get(PADDING):
                groups[group_of(request.args[2])].append(place)
        for places in groups.values():
            for first in range(0, len(places), self.batch_size):
                yield places[first : first + self.batch_size]

    def _answer(
        self, talks: Sequence[Messages], wanted: dict[str, Any], names: Sequence[tuple[str, Any]]
    ) -> tuple[list[Reply], Took]:
        settings, stops = settings_for(wanted)
        inputs = self.prompter(talks, self.blind)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        if stops:
            start = inputs["input_ids"].shape[1]
            settings["stopping_criteria"] = [Stops(stops, start, self.prompter.words)]
        first = names[0][1]
        with self.wrapping(first) as handle:
            ids, found, took = call(self.model, self.adapter, handle, inputs, settings)
        texts = self.prompter.words(ids)
        replies = [replace(r, text=cut(t, stops)) for r, t in zip(found, texts, strict=True)]
        self.replies |= dict(zip(names, replies, strict=True))
        self.batches.append(Batch(first, len(replies), took))
        return replies, took

    def _rounds(self, request: Any) -> list[str]:
        _, ask, wanted, doc_id, task, split = request.args
        doc, answers, info = self._doc(doc_id, task, split), [], None
        if request.metadata.get(PADDING):
            return answers
        talk = ask(doc)
        for number in range(1, ROUNDS + 1):
            replies, _ = self._answer([talk], wanted, [(task, doc_id)])
            answers.append(replies[0].text)
            state = {"previous_output": list(answers), "previous_round_info": info}
            following = ask(doc, round_idx=number, **state)
            if not isinstance(following, tuple):  # the task has one round
                return answers
            talk, over, _, info = following
            if over:
                return answers
        raise UnsupportedError(f"{task} has not ended a conversation after {ROUNDS} rounds.")


def _log(done: Sequence[tuple[Reply, Took, int]]) -> None:
    """Reports means per request to lmms-eval; a batch's time is shared by its requests."""
    n, new = len(done), sum(reply.new for reply, _, _ in done)
    seconds = sum(took.all / size for _, took, size in done) / 1000

    def mean(values: Iterator[float]) -> float:
        return sum(values) / n

    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=new,
        avg_speed=new / seconds if seconds else 0.0,
        additional_metrics={
            "total_requests": n,
            "first_token_ms": mean(took.first / size for _, took, size in done),
            "prefill_ms": mean(took.prefill / size for _, took, size in done),
            "score_ms": mean(took.score / size for _, took, size in done),
            "visual_tokens": mean(float(reply.tokens) for reply, _, _ in done),
            "kept_tokens": mean(reply.kept for reply, _, _ in done),
        },
    )
