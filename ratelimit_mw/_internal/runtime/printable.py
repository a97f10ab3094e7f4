"""Texts from outside, made safe for terminals and logs."""


def printable(text: str) -> str:
    """Return `text` with each character that is not printed replaced.

    A control character would clear a screen or forge a line of a log, and one that changes the direction of
    writing shows a name as another one.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
