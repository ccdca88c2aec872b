"""A `tiny` model made here from a spec: a Llama of under a million parameters that reads characters.

For learning the method, for tests, and for tasks small enough to train from scratch:
`tiny:hidden=128,layers=3,heads=4`.
"""

from __future__ import annotations

import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from ..errors import RecipeError

ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one id a printable ASCII character; anything else is `<unk>`."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build(
    *,
    seed: int = 0,
    head: bool = True,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    ffn: int = 0,
    context: int = 2048,
) -> tuple[LlamaForCausalLM | LlamaModel, PreTrainedTokenizerFast]:
    """A freshly initialised tiny model and its tokenizer; `head=False` leaves the language-model head out (a critic).

    `ffn` is the width of the feed-forward layers, 3 × hidden by default. The weights depend on `seed` alone.
    """
    if min(hidden, layers, heads, context) < 1:
        raise RecipeError("tiny: hidden, layers, heads and context must be at least 1")
    if hidden % heads or (hidden // heads) % 2:
        raise RecipeError(f"tiny: hidden={hidden} must be an even multiple of heads={heads}")
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ffn or 3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100.0,
        },  # wavelengths for hundreds of characters, not books
        initializer_range=min(
            hidden**-0.5, 0.09
        ),  # a large model's 0.02 makes one this narrow learn half as fast (docs/log.md)
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (LlamaForCausalLM if head else LlamaModel)(config), tokenizer


def classifier(backbone: LlamaModel, seed: int) -> LlamaForSequenceClassification:
    """A sequence classifier with one output around a tiny backbone."""
    config = LlamaConfig.from_dict(backbone.config.to_dict() | {"num_labels": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(backbone.state_dict())
    return model
