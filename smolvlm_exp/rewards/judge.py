"""Another model's opinion of each answer, over an OpenAI-compatible chat endpoint; it is sent texts, no images.

An answer that tells the judge what to say is a way to hack this reward: read samples of a run that it decides.
"""

import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from smolvlm_exp.rewards.completions import Conversation, Scores, questions, texts
from smolvlm_exp.utils.errors import RequestError, first_line
from smolvlm_exp.utils.fields import above

log = logging.getLogger(__name__)

AT_ONCE = 4  # requests
LARGEST = 2**20  # bytes of a reply that are read
BEST = 10  # the highest score that the judge may give
PLACE = re.compile(r"\{(question|answer|truth)\}")
BARE = re.compile(r"(\d+(?:\.\d+)?)(?: ?/ ?10)?\.?")  # a reply that is a score alone


@dataclass
class JudgeConfig:
    url: str | None = None  # the endpoint's base, as http://127.0.0.1:8000/v1; typed with the command, not from a file
    model: str | None = None  # the name by which the endpoint knows the judge
    prompt: str = (
        "Question about an image: {question}\nKnown about the image: {truth}\nAnswer: {answer}\n"
        'How good is the answer? Reply with JSON alone: {"score": a number from 0 (wrong) to 10 (right and complete)}'
    )  # with {question}, {answer} and {truth}; a row without truth is not judged by a prompt that has {truth}
    timeout: float = above(0, 30.0)  # seconds that a request may take to connect, and between parts of the reply
    key_variable: str | None = None  # the environment variable with the API key; typed with the command as well


class Judge:
    """A reward function: the judge's score / 10, None for an answer that it gave none.

    Attributes:
        failures: requests so far that brought no score (HTTP errors, time-outs, replies that are no score).
    """

    __name__ = "judge"  # what TRL calls the reward

    def __init__(self, config: JudgeConfig) -> None:
        """Raises RequestError where the settings cannot work."""
        if urlsplit(config.url or "").scheme not in ("http", "https") or not urlsplit(config.url or "").hostname:
            raise RequestError(
                f"reward.judge.url={config.url or 'null'}: give the endpoint's base, as http://127.0.0.1:8000/v1."
            )
        if not config.model:
            raise RequestError("reward.judge.model: give the name by which the endpoint knows the judge.")
        if config.key_variable and config.key_variable not in os.environ:
            raise RequestError(
                f"reward.judge.key_variable={config.key_variable}: there is no such variable in the environment."
            )
        self.config = config
        self.failures = 0

    def __call__(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        truth: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> Scores:
        known = truth or [None] * len(completions)
        rows = zip(questions(prompts), texts(completions), known, strict=True)
        filled = [self.fill(question, answer, row) for question, answer, row in rows]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            replies = list(pool.map(self.ask, filled))
        for reason in [reply for reply in replies if isinstance(reply, str)]:
            if not self.failures:
                log.warning(f"the judge gave an answer no score ({reason}): it gets no reward; others are counted only")
            self.failures += 1
        return [None if isinstance(reply, str) else reply for reply in replies]

    def fill(self, question: str, answer: str, truth: str | None) -> str | None:
        """The prompt of one answer; None where it asks for a truth that the row lacks."""
        values = {"question": question, "answer": answer, "truth": truth}
        if truth is None and "{truth}" in self.config.prompt:
            return None
        return PLACE.sub(lambda place: str(values[place[1]]), self.config.prompt)  # once: an answer may hold {truth}

    def ask(self, prompt: str | None) -> float | str | None:
        """The score / 10, None for no prompt, or as a text why there is no score."""
        from http.client import HTTPException

        if prompt is None:
            return None
        try:
            score = score_of(self.reply(prompt))
        except (OSError, HTTPException) as error:  # urllib's errors and time-outs are OSErrors
            return f"{type(error).__name__}: {first_line(error)}"
        return "its reply is no score from 0 to 10" if score is None else score / BEST

    def reply(self, prompt: str) -> bytes:
        from urllib.request import HTTPRedirectHandler, Request, build_opener

        class Stay(HTTPRedirectHandler):
            """A redirect would take the key to another address: it is an error."""

            def redirect_request(self, *args: Any) -> None:
                return None

        config, headers = self.config, {"Content-Type": "application/json"}
        if config.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[config.key_variable]}"
        body = {"model": config.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        url = f"{(config.url or '').rstrip('/')}/chat/completions"
        request = Request(url, json.dumps(body).encode(), headers)
        with build_opener(Stay).open(request, timeout=config.timeout) as answer:
            content: bytes = answer.read(LARGEST)
        return content


def score_of(content: bytes) -> float | None:
    """The score from 0 to 10 in an endpoint's reply, a bare number or JSON with `score`; None where there is none."""
    try:
        text = json.loads(content)["choices"][0]["message"]["content"].strip()
        bare, objects = BARE.fullmatch(text), re.findall(r"\{[^{}]*\}", text)
        score = float(bare[1] if bare else json.loads(objects[-1])["score"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return score if 0 <= score <= BEST else None
