"""Credentials have no place in what is shown."""

from __future__ import annotations

import re


def masked(text: str) -> str:
    """``text`` without the credentials of the URLs in it."""
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    return re.sub(r"(?i)([?&](?:\w|-)*(?:password|passwd|pwd|token|secret|signature)=)[^&\s]+", r"\1***", text)
