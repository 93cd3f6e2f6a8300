"""The chat template of an exported model: chats are written as the model was trained, whatever they hold."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from dehvf_ds.data.chat import PLAIN_CHAT_TEMPLATE
from dehvf_ds.model.texts import bos_ids

# Clients send a message as text, or as parts of which some are pictures; decoders' own templates know text.
_TEXTS = (
    "{%- set texts = namespace(of=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{%- set text = message.content -%}"
    "{%- else -%}{%- set text = message.content | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join(' ') -%}{%- endif -%}"
    "{%- set texts.of = texts.of + [{'role': message.role, 'content': text}] -%}"
    "{%- endfor -%}"
    "{%- set messages = texts.of -%}"
)
_PLAIN_TEXT = "{{ (messages | map(attribute='content') | join('\n')).rstrip() }}"


def export_template(tokenizer: PreTrainedTokenizerBase, task: str | None) -> str:
    """The template that a model is exported with.

    Args:
        tokenizer: the decoder's.
        task: what the model was trained for. ``chat`` keeps the form of the training; any other has learned
            plain prompts, so the messages' texts are the prompt.

    Returns:
        Jinja. It writes the begin-of-text token where the training had one.
    """
    bos = "{{ bos_token }}" if bos_ids(tokenizer) else ""
    if task != "chat":
        return _TEXTS + bos + _PLAIN_TEXT
    own: Any = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return _TEXTS + (own or bos + PLAIN_CHAT_TEMPLATE)
