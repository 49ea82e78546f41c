"""Let a model continue: text from an image, an image from a text, or both from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from pixelbytes.grammar import Grammar
from pixelbytes.models.common import SequenceModel
from pixelbytes.neighborhood import WindowBuilder
from pixelbytes.tokenizer import PixelBytesTokenizer

MAX_SIDE = 64  # largest prompt image; one pixel is one token


@dataclass
class Sample:
    """What was generated: the ids (L,), the image they stand for, and the text."""

    ids: NDArray[Any]
    image: Image.Image | None
    text: str


@dataclass
class Prompt:
    """What a sequence begins with.

    Args:
        text: beginning of the caption.
        image: a sprite, at most MAX_SIDE pixels a side.
        exact: the text is the whole caption; otherwise the model may write on (but leaves the last word as it is).
        keep_rows: lines of the image to keep; the model draws the rest. None keeps all.
    """

    text: str | None = None
    image: Image.Image | None = None
    exact: bool = False
    keep_rows: int | None = None

    def tokens(self, tokenizer: PixelBytesTokenizer) -> tuple[list[int], tuple[str, ...]]:
        """The ids, and the order of parts.

        A text alone comes first, so that the image is drawn from it; as soon as there is an image it comes first, and
        the text continues a caption for it.
        """
        text: list[int] = []
        if self.text:
            text = tokenizer.encode_text(self.text, "normalise").tolist()
            if not text:
                raise ValueError(f"prompt: no character of {self.text!r} is in the {tokenizer.kind!r} vocabulary")
        if self.image is None:
            if self.keep_rows is not None:
                raise ValueError("keep_rows: there is no prompt image to keep lines of")
            closed = [*text, tokenizer.end_id] if text and self.exact else text
            return closed, ("text", "image")
        width, height = self.image.size
        if max(width, height) > MAX_SIDE:
            raise ValueError(f"prompt image: {width} x {height} pixels, at most {MAX_SIDE} x {MAX_SIDE} can be read")
        ids = tokenizer.encode(self.image).tolist()
        if self.keep_rows is None or self.keep_rows >= height:
            return ids + text, ("image", "text")
        if self.keep_rows < 0:
            raise ValueError(f"keep_rows must not be negative, got {self.keep_rows}")
        if text:
            raise ValueError("keep_rows: a text cannot follow an image that is yet to be completed")
        header = len(ids) - height * (width + 1)
        return ids[: header + self.keep_rows * (width + 1)], ("image", "text")


def generate(
    model: SequenceModel,
    tokenizer: PixelBytesTokenizer,
    prompts: Sequence[Prompt] = (Prompt(),),
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    max_tokens: int = 1024,
    max_side: int = 25,
    max_text: int = 200,
    context: int = 256,
    free: bool = False,
    progress: bool = False,
) -> list[Sample]:
    """Continue each prompt to a full row, all in one batch.

    Causal Mamba and LSTM models carry a state, so that a token costs the same anywhere; others recompute their window
    of at most `context` tokens.

    Args:
        prompts: what the rows begin with; all go through the model together.
        temperature: 0 takes the likeliest token; 1 draws as the model says.
        top_k: draw from the k likeliest only.
        seed: of the draw.
        max_tokens: longest row, prompt included.
        max_side: largest side of an image that the model may announce.
        max_text: longest text.
        free: do not hold the model to well-formed rows (see grammar.Grammar). A row then ends at its third block end.
        progress: show a bar on a terminal.
    """
    if not prompts:
        return []
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if model.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"model: knows {model.vocab_size} ids, the tokenizer has {tokenizer.vocab_size}")
    writers = [_Writer(prompt, tokenizer, max_side, max_text, free) for prompt in prompts]
    draw = np.random.default_rng(seed)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    state = model.init_state(len(prompts), context)
    windows = np.zeros((len(prompts), 3, 3), dtype=np.int64)  # rows begin with a null window
    for _ in tqdm(range(max_tokens), desc="Generate", unit=" tokens", leave=False, disable=None if progress else True):
        logits, state = model.step(torch.from_numpy(windows).to(device), state)
        scores = logits.double().cpu().numpy()  # (batch, V)
        for index, writer in enumerate(writers):
            if not writer.done:
                windows[index] = writer.write(scores[index], temperature, top_k, draw)
        if all(writer.done for writer in writers):
            break
    model.train(was_training)
    return [writer.sample() for writer in writers]


class _Writer:
    """One row while it is written."""

    def __init__(
        self, prompt: Prompt, tokenizer: PixelBytesTokenizer, max_side: int, max_text: int, free: bool
    ) -> None:
        self._forced, plan = prompt.tokens(tokenizer)
        self._tokenizer, self._builder = tokenizer, WindowBuilder(tokenizer)
        self._grammar = None
        if not free:
            # The prompt is not the model's doing: its image and text may be larger than what the model may announce.
            size = max_side if prompt.image is None else max(max_side, *prompt.image.size)
            self._grammar = Grammar(tokenizer, plan, max_side=size, max_text=max_text + len(self._forced))
        self._blocks = 0  # complete ones; a row has three: header, image, text
        ends_in_word = prompt.text is not None and prompt.text[-1:].isalnum()
        self._whole_word = len(self._forced) if ends_in_word and not free else -1  # where a word must not grow
        self._word_ids = np.array([_is_letter(tokenizer.ids_to_tokens[i]) for i in range(tokenizer.vocab_size)])

    @property
    def done(self) -> bool:
        return self._blocks >= 3

    def write(
        self, scores: NDArray[np.float64], temperature: float, top_k: int | None, draw: np.random.Generator
    ) -> NDArray[Any]:
        """Add the next id, forced by the prompt or drawn from `scores` (V,); returns its (3, 3) window."""
        place = len(self._builder)
        if place < len(self._forced):
            token = self._forced[place]
        else:
            if self._grammar is not None:
                allowed = self._grammar.allowed()
                if place == self._whole_word:
                    allowed = allowed & ~self._word_ids
            else:
                allowed = np.arange(len(scores)) != self._tokenizer.null_id
            token = pick(np.where(allowed, scores, -np.inf), temperature, top_k, draw)
        if self._grammar is not None:
            self._grammar.advance(token)
        self._blocks += token == self._tokenizer.end_id
        return self._builder.append(token)

    def sample(self) -> Sample:
        ids = self._builder.ids()
        image, texts = None, []
        for kind, value in self._tokenizer.decode(ids):
            if kind == "image" and image is None:
                image = Image.fromarray(value)
            elif kind == "text":
                texts.append(value)
        return Sample(ids, image, " ".join(texts))


def _is_letter(token: Any) -> bool:
    """Whether a byte is part of a word; those above ASCII are parts of accented letters."""
    return isinstance(token, bytes) and len(token) == 1 and (token.isalnum() or token[0] >= 128)


def pick(scores: NDArray[np.float64], temperature: float, top_k: int | None, draw: np.random.Generator) -> int:
    """Draw an id from logits (V,), -inf where none may be; temperature 0 takes the highest, the first of equals."""
    if not np.isfinite(scores).any():
        raise RuntimeError("the model gives no finite score: its weights are not usable")
    if temperature == 0:
        return int(scores.argmax())
    if top_k is not None and top_k < len(scores):
        scores = np.where(scores >= np.partition(scores, -top_k)[-top_k], scores, -np.inf)
    weights = np.exp((scores - scores.max()) / temperature)
    return int(draw.choice(len(weights), p=weights / weights.sum()))
