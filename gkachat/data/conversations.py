"""Conversations as a model reads them: BOS, then each turn between the special tokens of who speaks."""

from collections.abc import Sequence

from gkachat.tokenizer import Tokenizer

Messages = Sequence[dict[str, str]]


def render(tokenizer: Tokenizer, messages: Messages) -> tuple[list[int], list[bool]]:
    """Ids, BOS first, and of each whether it is the assistant's."""
    ids, mask, before = [tokenizer.bos], [False], ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            before = f"{content}\n\n"
            continue
        said, before = tokenizer.encode(before + content), ""
        ids += [tokenizer.special[f"<|{role}_start|>"], *said, tokenizer.special[f"<|{role}_end|>"]]
        mask += [False, *[role == "assistant"] * (len(said) + 1)]
    return ids, mask


def prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Ids, BOS first, after which an assistant's answer is due."""
    return [*render(tokenizer, messages)[0], tokenizer.special["<|assistant_start|>"]]


def multiple_choice(question: str, choices: Sequence[str]) -> str:
    """How a question is asked whose answer is a letter."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", choices, strict=False))])
