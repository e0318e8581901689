"""What people write, cleaned the way the text encoder was trained (model.md section 11)."""

from __future__ import annotations

import html

import ftfy

from liveavatar.core import InputError


def clean(prompt: str) -> str:
    """Mend encoding damage, resolve HTML entities (twice) and collapse white space.

    An empty prompt is legal and stays empty. Raises InputError on what is no text, or not valid Unicode.
    """
    if not isinstance(prompt, str):
        raise InputError(f"prompt of type {type(prompt).__name__}: must be text")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"prompt: character {error.start} is not valid Unicode: write the text as UTF-8") from None
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
