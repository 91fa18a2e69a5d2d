"""Calls to an object store: made again while waiting can help; else an error that names the setting to look at.

Nothing here opens a store: ``storage`` does, and passes every call through a ``Line``. Libraries of object stores raise
exceptions of their own, which are told apart by the names of their types and by the codes of S3's protocol, so that
none of the libraries needs to be installed; never by their text, which holds the names of buckets and files.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.masking import SECRET_NAME

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

# A store that has never answered is most likely a wrong setting: this long. One that has is waited for, but no longer
# than the other workers wait for this one (their process group gives up after 600 s).
FIRST_CONTACT_S = 5.0
PATIENCE_S = 300.0
_LONGEST_PAUSE_S = 10.0

_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, as any fsspec program takes them"
_ENDPOINT = "AWS_ENDPOINT_URL (or FSSPEC_S3_ENDPOINT_URL)"
_STYLE = """FSSPEC_S3='{"config_kwargs": {"s3": {"addressing_style": "path"}}}'"""

# Types of errors and codes of S3's protocol, and what to do. The first row that has one of an error's signs counts.
_SETTINGS = (
    ("ProfileNotFound", "AWS_PROFILE names a profile that ~/.aws does not have"),
    ("InvalidAccessKeyId InvalidClientTokenId", "this store does not know the access key: check AWS_ACCESS_KEY_ID (or "
     f"AWS_PROFILE), and {_ENDPOINT}"),
    ("SignatureDoesNotMatch", "the secret does not belong to the access key: check AWS_SECRET_ACCESS_KEY (or "
     "AWS_PROFILE)"),
    ("ExpiredToken TokenRefreshRequired InvalidToken", "the session token is over: renew AWS_SESSION_TOKEN"),
    ("RequestTimeTooSkewed", "this machine's clock is wrong: set it"),
    ("PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException 301", "the bucket is in "
     "another region: set AWS_DEFAULT_REGION"),
    ("InvalidEndpoint", f"{_ENDPOINT} is no URL such as https://host:9000"),
    ("InvalidBucketName ParamValidationError", "the bucket's name is not one that a store can have: check the URL"),
    ("NoSuchBucket", f"there is no such bucket: create it, check the URL, or {_ENDPOINT}"),
    ("AccessDenied AllAccessDisabled Forbidden 403 PermissionError", "the credentials do not allow this: check the "
     f"bucket's policy, and {_CREDENTIALS}"),
)  # fmt: skip
# What waiting can help against, where the store has answered before; the advice is for one that never has.
_TRANSIENT = (
    ("NoCredentialsError PartialCredentialsError CredentialRetrievalError", "no credentials were found: set "
     f"{_CREDENTIALS}, or FSSPEC_S3_ANON=true for a public bucket"),
    ("SSLError SSLCertVerificationError ClientConnectorSSLError ClientConnectorCertificateError", "no secure "
     f"connection: check that {_ENDPOINT} says https only where the store speaks it, and AWS_CA_BUNDLE"),
    ("EndpointConnectionError ConnectTimeoutError ConnectionRefusedError ClientConnectorError ClientConnectorDNSError",
     f"nothing answers there: check {_ENDPOINT}, the network and proxies; a store that knows no bucket.host addresses "
     f"needs {_STYLE}"),
    ("Exception", f"check that the store is well, and that its address is right: {_ENDPOINT}"),
)  # fmt: skip


class StoreRefusedError(ValueError):
    """A store will not do this until a setting is changed; the message names the setting."""


class StoreUnreachableError(OSError):
    """A store did not answer for as long as it was worth waiting."""


_trusts = False
_stop = threading.Event()
_num_waiting = 0  # calls of this process that a failure makes wait
_counting = threading.Lock()


def trust_stores() -> None:
    """Whoever started this process has reached its stores: that one does not answer now is an outage."""
    global _trusts
    _trusts = True


def stop_waiting() -> None:
    """This process is to end: no call waits for a store any more, in any thread."""
    _stop.set()


def is_waiting() -> bool:
    """Whether some call of this process waits for a store that has answered before and does not now."""
    return _num_waiting > 0


def _count_waiting(change: int) -> None:
    global _num_waiting
    with _counting:
        _num_waiting += change


class Line:
    """The calls to one store. Threads may share it."""

    def __init__(self, *, first_contact_s: float = FIRST_CONTACT_S, patience_s: float = PATIENCE_S) -> None:
        self._first_contact_s, self._patience_s = first_contact_s, patience_s
        self._answered = False
        self._lock = threading.Lock()
        self._waiting = 0  # calls that a failure makes wait: the first of them tells, and the last

    def call(self, place: str, function: Callable[[], Result]) -> Result:
        """``function()``, again after failures that pass. ``place`` names the object for messages.

        Raises FileNotFoundError and FileExistsError as they are (the store has answered), StoreRefusedError where a
        setting is wrong, StoreUnreachableError when patience is over.
        """
        started_s, pause_s, tells = time.monotonic(), 0.2, False
        try:
            while True:
                try:
                    result = function()
                    self._answered = True
                    return result
                except FileExistsError:
                    self._answered = True
                    raise
                except Exception as error:
                    signs = _signs(error)
                    advice = _advice(signs, _SETTINGS)
                    # An upload that is gone is one whose end was answered, and the answer lost: it is sent again.
                    if isinstance(error, FileNotFoundError) and "NoSuchUpload" not in signs:
                        self._answered = True
                        if "NoSuchBucket" not in signs:
                            raise
                    if signs & {"InvalidRange", "416"}:
                        raise OSError(errno.EIO, f"{place} is truncated: it ends before what was asked for") from None
                    # In a worker, whose driver was not refused, keys are being renewed, or a gateway is confused.
                    if advice is not None and not _trusts:
                        raise StoreRefusedError(f"{place}: {advice}{_said(error)}") from None
                    if type(error).__module__ == "builtins" and not isinstance(error, OSError):
                        raise  # a fault of the program, not of the store
                    known, waited_s = self._answered or _trusts, time.monotonic() - started_s
                    if _stop.is_set() or waited_s >= (self._patience_s if known else self._first_contact_s):
                        said = f"no answer for {waited_s:.0f} s{_said(error)}"
                        if advice is not None:
                            raise StoreRefusedError(f"{place}: {advice}{_said(error)}") from None
                        if known:
                            raise StoreUnreachableError(f"{place}: {said}: the same command goes on later") from None
                        raise StoreRefusedError(f"{place}: {said}: {_advice(signs, _TRANSIENT)}") from None
                    if not tells and known and waited_s > 1:
                        tells = True
                        _count_waiting(+1)
                        self._tell(place, error)
                    _stop.wait(pause_s * random.uniform(0.5, 1))
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            if tells:
                _count_waiting(-1)
                self._tell_end(place, time.monotonic() - started_s)

    def _tell(self, place: str, error: Exception) -> None:
        with self._lock:
            self._waiting += 1
            if self._waiting == 1:
                _log.warning("%s: no answer; waiting up to %.0f s%s", place, self._patience_s, _said(error))

    def _tell_end(self, place: str, waited_s: float) -> None:
        with self._lock:
            self._waiting -= 1
            if not self._waiting:
                _log.warning("%s: waited %.0f s for it", place, waited_s)


def check_no_credentials(url: str) -> None:
    """Raises ValueError, without repeating them, where ``url`` holds credentials: URLs are shown and recorded."""
    address, _, query = url.partition("?")
    names = rf"(^|&){SECRET_NAME}="
    if re.search(r"://[^@]*:[^@]*@", address) or re.search(names, query, re.IGNORECASE):
        raise ValueError(f"a storage URL holds credentials: leave them out and set {_CREDENTIALS}")


def _signs(error: BaseException | None) -> set[str]:
    """Names of the types of ``error`` and of what caused it, and the codes that S3 gave."""
    signs: set[str] = set()
    for _ in range(8):
        if error is None:
            break
        signs |= {kind.__name__ for kind in type(error).__mro__}
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            signs.add(str(response.get("Error", {}).get("Code", "")))
        if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):  # botocore has no type for it
            signs |= {"InvalidEndpoint"}
        error = error.__cause__ or error.__context__
    return signs


def _advice(signs: set[str], table: tuple[tuple[str, str], ...]) -> str | None:
    return next((advice for row, advice in table if signs & set(row.split())), None)


def _said(error: BaseException) -> str:
    """The store's own words, short, in brackets, without what may hold a secret."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"(?i)((?:key|secret|token|signature|credential)[\w-]*\W{1,3})[\w+/=%-]{16,}", r"\1***", text)
    return f" ({text[:300]})"
