"""A tokenizer of single characters that fits the pico models' vocabulary of 64."""

from __future__ import annotations

import string
from typing import Any

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
ALPHABET = string.ascii_lowercase + string.digits + " .,:;?!'\"()+-*/=<>_%#&@"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def letters() -> Any:
    """Return a `PreTrainedTokenizerFast`: one token a character, capitals lowered, with a chat template.

    Example:
        >>> t = letters()
        >>> t("Ab 1")["input_ids"], t.decode([5, 6]), len(t)
        ([5, 6, 41, 32], 'ab', 64)
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *ALPHABET))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=64,
    )
    found.chat_template = TEMPLATE
    return found
