"""Small tokenizers trained on the spot, one for each way in which tokenizers of chat models cut text.

Nothing is downloaded. `byte_level` cuts text like GPT-2 and Qwen; `sentencepiece` like Llama 2, whose normalizer puts the mark
of a leading space before every stretch of text between control tokens; `metaspace` like newer conversions, with the mark on the
first stretch only; `unigram` like T5, whose vocabulary can match control strings.
"""

import re
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTROL_TOKENS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>",
)  # fmt: skip

TEXT = (
    """
The quick brown fox jumps over the lazy dog. A packing plan puts conversations into rows, and every row is full.
def reverse(text):
    return text[::-1]


print(reverse("hello"))  # olleh
USER: hello there, how are you? ASSISTANT: I am well, thank you.\n\n[INST] What is a token? [/INST] A piece of text.
user assistant system model tool    Hello hello  Hello\n\n\nHello\n\n  world: 1, 2, 3; <div class="a"> </div> <= >= |>
Der Löffel liegt auf dem Tisch. ¿Dónde está la biblioteca? 学习率太大时损失会发散。 こんにちは 😀🎉
""".splitlines(keepends=True)
    * 4
)

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _wrap(tokenizer: Tokenizer, rstrip: tuple[str, ...] = ()):
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=t in rstrip) for t in CONTROL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def _byte_level(pre_tokenizer, **options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["</s>"],
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrap(tokenizer, **options)


def byte_level():
    """Like Qwen2: text is split by a regular expression, then taken as bytes."""
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    return _byte_level(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )


def gpt2():
    """Like GPT-2, whose pre-tokenizer splits on its own."""
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def newlines():
    """Like Gemma: runs of line ends are added tokens that are not special."""
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False, special=False) for n in (1, 2, 3)])
    return tokenizer


def phi3():
    """Like Phi-3: control tokens swallow the white space after them."""
    return _byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False), rstrip=("<|end|>", "<|user|>", "<|assistant|>")
    )


def sentencepiece():
    """Like Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        show_progress=False,
    )
    # SentencePiece learns no piece that joins a letter to a sign or digit, and none with a line end.
    words = [word for line in TEXT for word in re.findall("[a-zA-Z]+|[^a-zA-Z \n]+", line)]
    tokenizer.train_from_iterator(words, trainer)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    return _wrap(_without_added_bytes(tokenizer))


def metaspace():
    """Like newer conversions of SentencePiece models."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for line in TEXT for word in line.split(" ")], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _wrap(_without_added_bytes(tokenizer))


def unigram():
    """Like T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=500, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrap(tokenizer)


def _without_added_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Make byte pieces ordinary vocabulary, as in real tokenizers; the trainer can only add them as special tokens."""
    import json

    specification = json.loads(tokenizer.to_str())
    specification["added_tokens"] = [t for t in specification["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(specification))


KINDS = {f.__name__: lru_cache(None)(f) for f in (byte_level, gpt2, newlines, phi3, sentencepiece, metaspace, unigram)}
