"""What a guest's agent says, or a QEMU that its guest has taken over, made fit to be shown."""

WORDS_LIMIT = 300
LONG_WORDS_LIMIT = 2000


def in_words(text: str, limit: int = WORDS_LIMIT) -> str:
    """*text*, safe to show on a terminal: one line, and not a long one."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def in_long_words(text: str) -> str:
    """The same, of one who gives reasons in sentences."""
    return in_words(text, LONG_WORDS_LIMIT)
