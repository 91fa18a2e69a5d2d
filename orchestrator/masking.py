"""Credentials have no place in what is shown."""

from __future__ import annotations

import re

# A parameter of a URL whose name ends so is a secret: shown nowhere, and refused in a storage's URL.
# Not MLflow's orderByKey: before "key" and "sig" stands nothing, or a sign.
_ANYWHERE = "apikey|accesskey|secret|token|password|passwd|pwd|signature|credential"
SECRET_NAME = rf"(?:(?:[\w.-]*[_.-])?(?:key|sig)|[\w.-]*(?:{_ANYWHERE}))"


def masked(text: str) -> str:
    """``text`` without the credentials of the URLs in it."""
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    text = re.sub(r'://[^\s"@/]*:[^\s"]*@', "://***@", text)  # a password may hold a slash, as AWS's keys do
    return re.sub(rf"(?i)([?&]{SECRET_NAME}=)[^&\s]+", r"\1***", text)
