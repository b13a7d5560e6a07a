"""What must not enter training: profanity, personal data, placeholders. Knows nothing of sources."""

from __future__ import annotations

import re

_PROFANITY = re.compile(
    r"\b(fuck\w*|shit\w*|bitch\w*|bastard\w*|asshole\w*|cunt\w*|dick(?:head)?|pussy|whore\w*|slut\w*|nigg\w+|fag(?:got)?s?"
    r"|rape[ds]?|raping|porn\w*|penis|vagina|retard(?:ed)?)\b",
    re.IGNORECASE,
)
_PERSONAL = re.compile(
    r"[\w.+-]+@[\w-]+\.\w{2,}"  # e-mail addresses
    r"|https?://\S+|www\.\S+"
    r"|(?<!\d)(?:\+?\d{1,2}[ .-]?)?\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?!\d)"  # phone numbers
)
_PLACEHOLDER = re.compile(r"\[[^\]]*(?:name|user|your|insert)[^\]]*\]|\bXXX+\b|<[a-z_ ]*name[a-z_ ]*>", re.IGNORECASE)


def rejection_reason(text: str) -> str | None:
    """Why a document is left out ("profanity", "personal data", "placeholder"), or None if it may be used."""
    if _PROFANITY.search(text):
        return "profanity"
    if _PERSONAL.search(text):
        return "personal data"
    if _PLACEHOLDER.search(text):
        return "placeholder"
    return None
