"""Likelihoods and continuations of texts: the tokenizer of a field beside its network."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from src.evals.language.continuation import Choose, continue_rows
from src.evals.language.elbo import Bound, Elbo, check_field
from src.evals.language.likelihood import log_likelihoods, windows
from src.evals.language.network import TextNetwork

BEGIN, END = "<s>", "</s>"  # of a text; also what lm-eval and transformers write for these ids
GAP = "\n\n"  # between what a system says and the question behind it, as `data/sources/_chats.py` has it
Told = Callable[[int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class TextModel:
    """A network with the tokenizer of its field.

    add_bos  whether a text begins with the begin-of-text id: every row of training does
    headers  whether "### Human: " and "### Assistant: " stand before the turns of a chat, as in training
    about    what the scores depend on, for reports
    elbo     likelihoods are bounds under masked diffusion, see `elbo.Elbo`; None: exact, under next-token prediction
    bounds   those that were estimated so far

    Raises ValueError for a field whose codec is no tokenizer.
    """

    network: TextNetwork
    add_bos: bool = True
    headers: bool = False
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    elbo: Elbo | None = None
    bounds: list[Bound] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if not hasattr(self.codec, "bos"):
            name = self.network.field.name
            raise ValueError(f"fields.{name} has no tokenizer, its first codec is {type(self.codec).__name__}")
        if self.elbo is not None:
            check_field(self.network)

    @property
    def codec(self) -> Any:
        """The tokenizer."""
        return self.network.field.codec.host

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of a text, in which `<s>` and `</s>` are the ids that begin and end a text.

        bos   whether `<s>` is put in front; None: as `add_bos` says, and not where the text begins with it

        Raises ValueError for characters that the tokenizer does not know.
        """
        ids, names = [], {BEGIN: self.codec.bos, END: self.codec.eos}
        for part in re.split(f"({BEGIN}|{END})", text):
            ids += [names[part]] if part in names else self.codec.encode(part) if part else []
        add = self.add_bos and not text.startswith(BEGIN) if bos is None else bos
        return [self.codec.bos, *ids] if add else ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text as it stands, without `<s>`. Raises ValueError for characters that the tokenizer lacks."""
        return list(self.codec.encode(text)) if text else []

    def log_likelihoods(self, pairs: Sequence[Any], told: Told | None = None) -> list[tuple[float, bool]]:
        """See `likelihood.log_likelihoods`; with `elbo` the negative bounds, and False for the most likely."""
        if self.elbo is None:
            return log_likelihoods(self.network, pairs, told)
        found = self.elbo(self.network, pairs, told)
        self.bounds.extend(found)
        return [(-bound.nats, False) for bound in found]

    def uncertainty(self) -> dict[str, Any]:
        """Of the bounds so far: how many, the draws of each, and the root mean square and the largest of their
        standard errors, in nats. Empty for exact likelihoods."""
        errors = [bound.error for bound in self.bounds]
        if not errors:
            return {}
        square = math.fsum(error**2 for error in errors) / len(errors)
        about = {"bounds": len(errors), "draws": self.bounds[0].draws}
        return about | {"standard_error": square**0.5, "largest_standard_error": max(errors)}

    def whole(
        self, texts: Sequence[Sequence[int]], context: int = 1, told: Told | None = None
    ) -> list[tuple[float, int]]:
        """Of the ids of each text: the sum of log p (nats) of all of them behind the begin-of-text id, and how many
        there are. See `likelihood.windows`."""
        length = self.network.length - (self.elbo is not None)  # a bound reads the last token, too, as a mask
        cut = [list(windows(ids, self.codec.bos, length, context)) for ids in texts]
        found = iter(self.log_likelihoods([pair for pairs in cut for pair in pairs], told))
        return [(sum(next(found)[0] for _ in pairs), len(ids)) for pairs, ids in zip(cut, texts, strict=True)]

    def go_on(
        self,
        prompts: Sequence[str],
        new: int,
        until: Sequence[str] = (),
        choose: Choose | None = None,
        seed: int = 0,
        told: Told | None = None,
    ) -> list[str]:
        """What follows each prompt, in up to `new` tokens, up to the first of the texts `until`, which is left out.

        A prompt that is too long loses its beginning. Raises ValueError where `new` leaves no room for it.
        """
        room, until = self.network.length - new, [text for text in until if text]
        if room < 1:
            raise ValueError(
                f"{new} new tokens leave no room for a prompt, rows have {self.network.length}: ask for fewer"
                " (max_gen_toks), or give a larger max_length"
            )
        rows = [(self.encode(self._open(prompt)) or [self.codec.bos])[-room:] for prompt in prompts]
        stops = lambda ids: any(text in self.codec.decode(ids) for text in until)
        made = continue_rows(self.network, rows, new, stops=stops, choose=choose, seed=seed, told=told)
        texts = [self.codec.decode(ids) for ids in made]
        for text in until:
            texts = [made.partition(text)[0] for made in texts]
        return texts

    def chat(self, messages: Sequence[Mapping[str, Any]], answer: bool = True) -> str:
        """A chat as text: `<s> question answer </s>` for each pair of turns, as in training.

        answer   an answer follows; else the last message goes on

        Raises ValueError for roles that do not take turns.
        """
        text, waiting, asked, gap = "", "", False, ""
        for number, message in enumerate(messages):
            role, said = message["role"], str(message["content"])
            if role in ("system", "developer"):
                waiting += f"{said}{GAP}"
                continue
            if role != ("assistant" if asked else "user"):
                raise ValueError(f"message {number} of a chat is of {role!r}: user and assistant must take turns")
            if asked:
                last = number == len(messages) - 1 and not answer
                text += f"{gap}{self._header('Assistant')}{said}{'' if last else END}"
            else:
                said, waiting = f"{waiting}{said}", ""
                text, gap = f"{text}{BEGIN}{self._header('Human')}{said}", self._gap(said)
            asked = not asked
        return text + (f"{gap}{self._header('Assistant')}" if answer else "")

    def _header(self, who: str) -> str:
        return f"### {who}: " if self.headers else ""

    def _gap(self, text: str) -> str:
        """What stands between question and answer so that each is encoded as by itself: a space, where the tokenizer
        puts one before a text."""
        word = next(iter(text.split()), "")
        return " " if word and self.codec.decode(2 * self.codec.encode(word)) == f"{word} {word}" else ""

    def _open(self, prompt: str) -> str:
        """A prompt of a chat without the space behind it, which belongs to the answer's first word."""
        return prompt.rstrip(" ") if prompt.startswith(BEGIN) else prompt
