"""An lm-eval model that reads long prompts in pieces through the cache, reads what prompts share once, and stops at the answer.

The numbers are those of lm-eval's own `HFLM`; what differs is the memory and the time they take:

- A prompt is read in pieces of at most `chunk` tokens through the model's cache, so that activations do not grow with its length.
- Prompts that start alike (questions on one document, choices after one context, pieces of one text) share the reading of that start.
- Generation ends for each prompt where its answer does: at the cap, the end of text, a stop text, or, where saying more cannot lower a
  score of 1, as soon as everything asked for is said.
- Documents are split among the processes of `accelerate launch`, on GPUs or on CPUs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor

__all__ = ["MemoryLM"]

CHUNK = 2048
SHARED = 128  # prompts with fewer tokens in common are read each on its own
LOGITS = 2**27  # most logits of one piece: 512 MiB in float32
# Settings of a model's own generation_config that change greedy answers; HFLM honours them, so these models are left to it.
CHANGES = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beams": (None, 1),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}


class _Rows:
    """Rows that are read together: a cache, which of the tokens so far are real, and how many they are."""

    def __init__(self, rows: int, device) -> None:
        self.cache = None
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=device)

    def repeat(self, times: int) -> _Rows:
        """`times` rows that have all read what this one row has; this one is left as it is."""
        new = _Rows(0, self.mask.device)
        new.cache = copy.deepcopy(self.cache)
        new.cache.batch_select_indices(torch.zeros(times, dtype=torch.long, device=self.mask.device))
        new.mask = self.mask.repeat(times, 1)
        return new


class MemoryLM(HFLM):
    """lm-eval's `hf` model around a transformers model in memory.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: prompts at a time.
        chunk: tokens of a prompt that are read at a time.
        accelerator: an accelerate.Accelerator; documents are split among its processes if there are several.
        on_read: called with (tokens read since the last call, tokens to read in all) of the requests at hand.
    """

    def __init__(
        self,
        model,
        tokenizer,
        batch_size: int = 8,
        chunk: int = CHUNK,
        accelerator=None,
        on_read: Callable[[int, int], None] | None = None,
    ) -> None:
        model.eval()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.chunk, self.on_read = chunk, on_read
        self.tokens_read = 0  # by this process since it was made; generated ones are not counted
        if accelerator is not None and accelerator.num_processes > 1:
            self.accelerator, self._device = accelerator, model.device
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self.world_size <= 1:
            return tensor
        return self.accelerator.gather(tensor.to(self.accelerator.device))

    @property
    def reads_in_pieces(self) -> bool:
        """Whether the model has a cache that this class can read into; if not, HFLM does everything."""
        model = self.model
        if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "_supports_default_dynamic_cache"):
            return False
        if getattr(model.config, "segmentation", None) == "log":  # segments that depend on the whole length
            return False
        from ..models.base import MemzooPreTrainedModel

        taken = inspect.signature(model.forward).parameters
        if not all(name in taken for name in ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")):
            return False
        return isinstance(model, MemzooPreTrainedModel) or model._supports_default_dynamic_cache()

    # Reading

    def _extend(
        self, rows: _Rows, tokens: Sequence[Sequence[int]], take: Callable[[int, int, Tensor], None] | None = None, ranges=None
    ) -> Tensor:
        """Read `tokens`, one list a row, padded on the left; the logits [rows, vocab] after the last of them.

        `ranges` [(from, to)] a row are the places in its list whose logits `take(first column, padded width, logits)` gets, piece by piece.
        """
        count, width = len(tokens), max(map(len, tokens))
        ids = torch.full((count, width), self.tokenizer.pad_token_id or 0, dtype=torch.long)
        real = torch.zeros(count, width, dtype=torch.long)
        for row, list_ in enumerate(tokens):
            ids[row, width - len(list_) :] = torch.as_tensor(list_)
            real[row, width - len(list_) :] = 1
        ids, real = ids.to(self.device), real.to(self.device)
        wanted = (width, width)
        chunk = self.chunk
        if ranges is not None:
            pads = [width - len(list_) for list_ in tokens]
            wanted = min(pad + a for pad, (a, _) in zip(pads, ranges)), max(pad + b for pad, (_, b) in zip(pads, ranges))
            chunk = min(chunk, max(LOGITS // (count * self.model.config.get_text_config().vocab_size), 16))
        last = None
        for start in range(0, width, chunk):
            stop = min(start + chunk, width)
            piece = real[:, start:stop]
            positions = (rows.mask.sum(1, keepdim=True) + piece.cumsum(1) - 1).clamp(min=0)
            rows.mask = torch.cat((rows.mask, piece), 1)
            low, high = max(start, wanted[0]), min(stop, wanted[1])
            keep = torch.arange(low - start, high - start, device=self.device) if take and low < high else 1
            output = self.model(
                input_ids=ids[:, start:stop],
                attention_mask=rows.mask,
                position_ids=positions,
                past_key_values=rows.cache,
                use_cache=True,
                logits_to_keep=keep,
            )
            rows.cache = output.past_key_values
            if take and low < high:
                take(low, width, output.logits)
            last = output.logits[:, -1]
            read = sum(min(stop - width + len(list_), stop - start, len(list_)) for list_ in tokens if stop > width - len(list_))
            self.tokens_read += read
            if self.on_read:
                self.on_read(read, self._to_read)
        return last

    def _groups(self, rows: Sequence[np.ndarray], limits: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(tokens that are read once, rows) so that every row is in one group; a row shares at most its limit."""
        groups: list[tuple[int, list[int]]] = []
        for i in _in_order(rows):
            if groups:
                shared, members = groups[-1]
                common = min(_common(rows[members[0]], rows[i]), limits[i])
                common = min(common, limits[members[0]] if len(members) == 1 else shared)
                if common >= SHARED and common >= shared // 2:
                    groups[-1] = (common, [*members, i])
                    continue
            groups.append((0, [i]))
        return groups

    def _batches(self, rows: Sequence[np.ndarray], limits: Sequence[int]) -> Iterator[tuple[_Rows, list[int], int]]:
        """(rows that have read what they share, which rows they are, tokens they have read), the longest first."""
        groups = self._groups(rows, limits)
        self._to_read = max(sum(shared + sum(len(rows[i]) - shared for i in members) for shared, members in groups), 1)
        alone = sorted((members[0] for shared, members in groups if not shared), key=lambda i: -len(rows[i]))
        for start in range(0, len(alone), self.batch_size):
            batch = alone[start : start + self.batch_size]
            yield _Rows(len(batch), self.device), batch, 0
        for shared, members in (group for group in groups if group[0]):
            first = _Rows(1, self.device)
            self._extend(first, [rows[members[0]][:shared]])
            if not all(hasattr(layer, "batch_select_indices") for layer in first.cache.layers):
                shared = 0  # this cache cannot be shared out
            members = sorted(members, key=lambda i: -len(rows[i]))
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                yield first.repeat(len(batch)) if shared else _Rows(len(batch), self.device), batch, shared

    # Generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        caps, stops = [], []
        for request in requests:
            settings = normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)
            stops.append(handle_stop_sequences(copy.copy(settings.pop("until", None)), eos=eos))
            caps.append(settings.pop("max_gen_toks"))
            sampled, temperature = settings.pop("do_sample", None), settings.pop("temperature", 0.0)
            greedy = sampled is False or (sampled is None and not temperature)
            if not greedy or settings or not self._plain_generation:
                return super().generate_until(requests, disable_tqdm=True)
        # As HFLM does, the start of a prompt is cut off where `max_length` says so.
        rows = [np.asarray(self.tok_encode(r.args[0])[-(self.max_length - cap) :]) for r, cap in zip(requests, caps)]
        answers = [""] * len(requests)
        with torch.inference_mode():
            for state, batch, shared in self._batches(rows, [len(row) - 1 for row in rows]):
                said = self._generate(
                    state,
                    [rows[i][shared:] for i in batch],
                    [caps[i] for i in batch],
                    [lambda text, i=i: _ends(text, stops[i], requests[i].doc) for i in batch],
                )
                for i, text in zip(batch, said):
                    answers[i] = postprocess_generated_text(text, stops[i], None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    @property
    def _plain_generation(self) -> bool:
        config = getattr(self.model, "generation_config", None)
        return self.reads_in_pieces and all(getattr(config, name, usual[0]) in usual for name, usual in CHANGES.items())

    def _generate(self, state: _Rows, tokens: Sequence[np.ndarray], caps: Sequence[int], ended: Sequence[Callable]) -> list[str]:
        """What the model says after `tokens`, greedily, a row at most `caps` tokens and until `ended(text)`."""
        logits = self._extend(state, tokens)
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends or ())}
        said: list[list[int]] = [[] for _ in tokens]
        open_ = [cap > 0 for cap in caps]
        while any(open_):
            chosen = logits.argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                if not open_[row]:
                    continue
                said[row].append(token)
                done = token in ends or len(said[row]) >= caps[row]
                open_[row] = not done and not ended[row](self.tok_decode(said[row]))
            if any(open_):
                state.mask = torch.cat((state.mask, torch.ones_like(state.mask[:, :1])), 1)
                output = self.model(
                    input_ids=chosen[:, None],
                    attention_mask=state.mask,
                    position_ids=state.mask.sum(1, keepdim=True) - 1,
                    past_key_values=state.cache,
                    use_cache=True,
                )
                logits = output.logits[:, -1]
        return [self.tok_decode(row) for row in said]

    # Log-likelihoods

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        if not self.reads_in_pieces:
            return super().loglikelihood(requests, disable_tqdm=True)
        encoded = []
        for _, group in groupby(requests, key=lambda request: id(request.doc)):
            pairs = [request.args for request in group]
            together = self._encode_together(pairs)
            if together is None:
                together = [self._encode_pair(*pair) if pair[0] else self._encode_alone(pair[1]) for pair in pairs]
            encoded += [(pair, *ids) for pair, ids in zip(pairs, together)]
        return self._loglikelihood_tokens(encoded, disable_tqdm=True)

    def _encode_alone(self, said: str) -> tuple[list[int], list[int]]:
        """Of a text with nothing before it: the prefix token stands there, unless the text brings it."""
        ids = self.tok_encode(said, add_special_tokens=False)
        prefix = self.prefix_token_id
        return ([prefix], ids) if prefix != ids[0] else (ids[:1], ids[1:])

    def _encode_together(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, list[int]]] | None:
        """What `_encode_pair` gives for many contexts that are starts of the longest one, which is encoded once; None if it differs.

        The queries of one long sequence would else be encoded each on its own, which takes longer than reading the sequence.
        """
        longest = max((context for context, _ in pairs), key=len)
        if len(pairs) < 4 or not all(context and longest.startswith(context) and said[:1] == " " for context, said in pairs):
            return None
        whole = self.tok_encode(longest)
        encoding = self.tokenizer(longest, return_offsets_mapping=True)
        if encoding["input_ids"] != whole:
            return None
        ids, ends = np.asarray(whole), np.array([end for _, end in encoding["offset_mapping"]])
        words = {said: self._encode_pair(longest[: len(pairs[0][0])], said)[1] for said in {said for _, said in pairs}}
        found = [(ids[: np.searchsorted(ends, len(context), side="right")], words[said]) for context, said in pairs]
        for number in {0, len(pairs) // 2, len(pairs) - 1}:
            context, said = self._encode_pair(*pairs[number])
            if context != found[number][0].tolist() or said != found[number][1]:
                return None
        return found

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        if not self.reads_in_pieces:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        inputs = [np.concatenate((context, said)).astype(np.int32)[-(self.max_length + 1) :][:-1] for _, context, said in requests]
        targets = [torch.tensor(said, device=self.device) for _, _, said in requests]
        starts = [len(row) - len(said) for row, said in zip(inputs, targets)]
        # A row that is the start of another one is read with it.
        read_by: dict[int, list[int]] = {}
        reader = None
        for i in _in_order(inputs)[::-1]:
            if reader is None or _common(inputs[reader], inputs[i]) < len(inputs[i]):
                reader = i
            read_by.setdefault(reader, []).append(i)
        readers = list(read_by)
        rows = [inputs[i] for i in readers]
        limits = [min(starts[j] for j in read_by[i]) for i in readers]
        totals = torch.zeros(len(requests), dtype=torch.float64)
        greedy = [True] * len(requests)
        with torch.inference_mode():
            for state, batch, shared in self._batches(rows, limits):
                tokens = [rows[i][shared:] for i in batch]
                wanted = [(j, row, starts[j] - shared) for row, i in enumerate(batch) for j in read_by[readers[i]]]

                take = partial(_take, wanted, [len(row) for row in tokens], targets, totals, greedy)
                ranges = [
                    (
                        min(starts[j] for j in read_by[readers[i]]) - shared,
                        max(starts[j] + len(targets[j]) for j in read_by[readers[i]]) - shared,
                    )
                    for i in batch
                ]
                self._extend(state, tokens, take, ranges)
        answers = [(total, said) for total, said in zip(totals.tolist(), greedy)]
        for (request, *_), answer in zip(requests, answers):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers


def _take(
    wanted: Sequence[tuple[int, int, int]],
    sizes: Sequence[int],
    targets: Sequence[Tensor],
    totals: Tensor,
    greedy: list[bool],
    first: int,
    width: int,
    logits: Tensor,
) -> None:
    """Add to each request what logits [rows, columns from `first` on, vocab] of rows padded to `width` say about its targets.

    `wanted` are (request, its row, place in the row of the logits of its first target); `sizes` the tokens of each row.
    """
    logits = logits.float()
    norms, best = logits.logsumexp(-1), logits.argmax(-1)
    for request, row, start in wanted:
        begin = width - sizes[row] + start
        low, high = max(begin, first), min(begin + len(targets[request]), first + logits.shape[1])
        if low < high:
            asked, here = targets[request][low - begin : high - begin], slice(low - first, high - first)
            chances = logits[row, here].gather(1, asked[:, None])[:, 0] - norms[row, here]
            totals[request] += chances.double().sum().cpu()
            greedy[request] = greedy[request] and bool((best[row, here] == asked).all())


def _in_order(rows: Sequence[np.ndarray]) -> list[int]:
    """Indices of the rows as a dictionary orders words: a row comes right before those it is the start of."""
    return sorted(range(len(rows)), key=lambda i: rows[i].astype(">u4").tobytes())


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that two rows start with in common."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _ends(text: str, stops: Sequence[str], doc: dict) -> bool:
    """Whether an answer is complete: a stop text is in it, or everything asked for is said where more cannot hurt."""
    if any(stop and stop in text for stop in stops):
        return True
    return bool(doc.get("monotone")) and all(value.lower() in text.lower() for value in doc["outputs"])
