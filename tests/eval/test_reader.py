"""Reading in pieces: the answers of lm-eval's HFLM one prompt at a time, whatever the batch, the pieces and what prompts share."""

import pytest
import torch
from conftest import KINDS, TOKENIZER, tiny
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM

from memzoo.data import prose
from memzoo.data.tasks import documents, requests_of
from memzoo.evaluation.reader import MemoryLM
from memzoo.models.presets import FAMILIES

WORDS = prose("test").split()


def text(start, count):
    return " ".join(WORDS[start : start + count])


def asked(contexts, cap=12, doc=None, **settings):
    settings = {"do_sample": False, "max_gen_toks": cap, "until": [], **settings}
    return [Instance("generate_until", doc or {}, (context, dict(settings)), index) for index, context in enumerate(contexts)]


def scored(pairs):
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


class Watched:
    """What a model was given: the shape of every input, and how many logits were asked for."""

    def __init__(self, model):
        self.widths, self.rows, self.logits = [], [], []
        model.register_forward_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs, output):
        rows, width = kwargs["input_ids"].shape
        self.rows.append(rows)
        self.widths.append(width)
        self.logits.append(output.logits.shape[1])


@pytest.fixture(params=KINDS)
def model(request):
    return tiny(request.param)


@pytest.mark.parametrize("kind", ["llama", *FAMILIES])
def test_answers_do_not_depend_on_batch_padding_or_pieces(kind):
    model = tiny(kind)
    contexts = [text(0, 40), text(300, 7), text(500, 70), "Anne", text(900, 50)]
    alone = HFLM(pretrained=model, tokenizer=TOKENIZER, backend="causal", batch_size=1)
    expected = alone.generate_until(asked(contexts), disable_tqdm=True)
    assert len(set(expected)) == len(contexts)  # the answers tell the prompts apart
    for batch, chunk in ((1, 10_000), (1, 16), (5, 10_000), (3, 33), (2, 1)):
        assert MemoryLM(model, TOKENIZER, batch, chunk).generate_until(asked(contexts)) == expected


def test_log_likelihoods_do_not_depend_on_batch_padding_or_pieces(model):
    pairs = [("", "Anne was"), (text(0, 60), " a very fine day"), (text(300, 5), " " + text(305, 70)), ("Sir", " Walter")]
    pairs += [(text(0, 60), f" {word}") for word in ("the", "a", "was")]
    expected = HFLM(pretrained=model, tokenizer=TOKENIZER, backend="causal", batch_size=1).loglikelihood(scored(pairs))
    best = [(text(0, 30), " " + TOKENIZER.decode([_first(model, text(0, 30))]).strip())]
    for batch, chunk in ((1, 10_000), (7, 10_000), (3, 20), (2, 1)):
        found = MemoryLM(model, TOKENIZER, batch, chunk).loglikelihood(scored(pairs))
        assert [chance for chance, _ in found] == pytest.approx([chance for chance, _ in expected], rel=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        lm = MemoryLM(model, TOKENIZER, batch, chunk)
        assert lm.loglikelihood(scored(best)) == [
            (pytest.approx(chance, rel=1e-4), greedy)
            for chance, greedy in HFLM(pretrained=model, tokenizer=TOKENIZER, backend="causal", batch_size=1).loglikelihood(
                scored(best)
            )
        ]


def _first(model, context):
    with torch.no_grad():
        return int(model(torch.tensor([TOKENIZER(context).input_ids])).logits[0, -1].argmax())


def test_long_prompts_are_read_in_pieces(model):
    watched, context = Watched(model), text(0, 3000)
    tokens = len(TOKENIZER(context).input_ids)
    lm = MemoryLM(model, TOKENIZER, 1, 256)
    lm._max_length = 10**6
    lm.generate_until(asked([context], cap=2))
    pieces = -(-tokens // 256)
    assert tokens > 4000 and max(watched.widths) == 256 and len(watched.widths) == pieces + 1
    assert set(watched.logits) == {1}  # a prompt costs the logits of its last token only
    lm.loglikelihood(scored([(context, " and so on")]))
    assert max(watched.logits) <= 8 and lm.tokens_read == 2 * tokens + len(TOKENIZER(" and so on").input_ids) - 1


def test_what_prompts_share_is_read_once(model):
    start = text(0, 400)
    contexts = [f"{start} Question: {word}?" for word in ("who", "where", "why it was so", "when", "how")] + [text(2000, 30)]
    alone = HFLM(pretrained=model, tokenizer=TOKENIZER, backend="causal", batch_size=1, max_length=1000)
    expected = alone.generate_until(asked(contexts), disable_tqdm=True)
    for batch in (1, 2, 8):
        lm = MemoryLM(model, TOKENIZER, batch, 100)
        lm._max_length = 1000
        assert lm.generate_until(asked(contexts)) == expected
        assert lm.tokens_read < len(TOKENIZER(start).input_ids) + 5 * 12 + len(TOKENIZER(contexts[-1]).input_ids)


def test_pieces_of_one_text_are_read_once(model):
    words = text(0, 200)
    cuts = [0, 150, 310, 640, len(words)]
    cuts = [words.index(" ", cut) if 0 < cut < len(words) else cut for cut in cuts]
    pairs = [(words[:a], words[a:b]) for a, b in zip(cuts, cuts[1:])]
    lm = MemoryLM(model, TOKENIZER, 4, 50)
    found = lm.loglikelihood(scored(pairs))
    expected = HFLM(pretrained=model, tokenizer=TOKENIZER, backend="causal", batch_size=1).loglikelihood(scored(pairs))
    assert [chance for chance, _ in found] == pytest.approx([chance for chance, _ in expected], rel=1e-4)
    tokens = [len(TOKENIZER(words[:b]).input_ids) for b in cuts[1:]]
    assert lm.tokens_read <= tokens[-1] + tokens[0]  # the first piece has the end of text before it, the others nothing


def test_generation_stops_at_the_answer(model):
    context = text(0, 30)
    whole = MemoryLM(model, TOKENIZER).generate_until(asked([context], cap=40))[0]
    assert len(TOKENIZER(whole).input_ids) > 20
    watched = Watched(model)
    wanted = whole.split()[1]
    doc = {"outputs": [wanted.upper()], "monotone": True}
    short = MemoryLM(model, TOKENIZER).generate_until(asked([context], cap=40, doc=doc))[0]
    assert wanted in short and whole.startswith(short) and len(watched.widths) < 15
    assert MemoryLM(model, TOKENIZER).generate_until(asked([context], cap=40, doc={**doc, "monotone": False}))[0] == whole
    until = whole[len(whole) // 2]
    stopped = MemoryLM(model, TOKENIZER).generate_until(asked([context], cap=40, until=[until]))[0]
    assert stopped == whole.split(until)[0]


def test_the_end_of_text_ends_an_answer(model):
    context = text(0, 30)
    model.generation_config.eos_token_id = [_first(model, context), 2]
    watched = Watched(model)
    MemoryLM(model, TOKENIZER).generate_until(asked([context], cap=40))
    assert len(watched.widths) == 1


def test_sampling_and_odd_settings_are_left_to_hflm(model, monkeypatch):
    called = []
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, disable_tqdm=False: called.append(requests) or ["x"])
    lm = MemoryLM(model, TOKENIZER)
    assert lm.generate_until(asked(["Anne"], do_sample=True)) == ["x"]
    assert lm.generate_until(asked(["Anne"], temperature=0.7, do_sample=None)) == ["x"]
    assert lm.generate_until(asked(["Anne"], top_k=3)) == ["x"]
    model.generation_config.repetition_penalty = 1.5
    assert lm.generate_until(asked(["Anne"])) == ["x"] and len(called) == 4


def test_a_model_of_another_shape_is_left_to_hflm():
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
            return super().forward(input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache, **kwargs)

    model = Plain(tiny("llama").config).eval()
    lm, alone = MemoryLM(model, TOKENIZER), HFLM(pretrained=model, tokenizer=TOKENIZER, backend="causal", batch_size=1)
    contexts, pairs = [text(0, 20), text(50, 9)], [(text(0, 20), " and"), ("", "Anne")]
    assert not lm.reads_in_pieces and lm.tokens_read == 0
    assert lm.generate_until(asked(contexts)) == alone.generate_until(asked(contexts), disable_tqdm=True)
    found, expected = ([chance for chance, _ in held.loglikelihood(scored(pairs))] for held in (lm, alone))
    assert found == pytest.approx(expected, rel=1e-4)


def test_prompts_are_cut_where_lm_eval_cuts_them(model):
    context = text(0, 300)
    theirs = HFLM(pretrained=model, tokenizer=TOKENIZER, backend="causal", batch_size=1, max_length=100)
    ours = MemoryLM(model, TOKENIZER)
    ours._max_length = 100
    assert ours.generate_until(asked([context])) == theirs.generate_until(asked([context]), disable_tqdm=True)
    rolling = [Instance("loglikelihood_rolling", {}, (context,), 0)]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), rel=1e-4)


def test_queries_of_one_sequence_are_encoded_as_each_alone(model):
    (document,) = documents("mqar", TOKENIZER, 300, 1)
    pairs = requests_of("mqar", document)
    lm = MemoryLM(model, TOKENIZER)
    together = [(context.tolist(), said) for context, said in lm._encode_together(pairs)]
    assert together == [lm._encode_pair(*pair) for pair in pairs] and len(pairs) == 18
    assert lm._encode_together([(context + "x", said) for context, said in pairs]) is None  # no starts of one another
    assert lm._encode_together(pairs[:3]) is None
    words = [(context[:-1], said) for context, said in pairs]  # cut within a word, where the longest one is not
    assert lm._encode_together(words) is None
