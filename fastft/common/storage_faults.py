"""Finds the cause of an object storage error, what to tell the user, and whether to retry.

    diagnose(error) is EXPIRED        # ExpiredToken of S3, google's RefreshError, HTTP status 401, …

The libraries of S3, GCS and Azure each have their own classes of errors, and fsspec turns some of them into OSErrors. But in
their chain of causes there is always the service's code, an HTTP status, or a class whose name tells the cause.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fastft.common.files import FULL
from fastft.errors import UserError


@dataclass(frozen=True)
class Fault:
    """A cause, and what can be done about it."""

    words: str
    """The cause, to follow "s3://bucket/run: "."""
    advice: str
    """What the user can do."""
    tries: int | None
    """How often to retry; None for a temporary cause, which is retried for minutes."""
    renews: bool = False
    """Whether to read the credentials anew before the next try."""


AGAIN = "then start the same command again"
NETWORK = Fault("cannot be reached", f"check the network and the address of the endpoint, {AGAIN}", None)
BUSY = Fault("is overloaded or failing", f"wait until it works again, {AGAIN}", None)
EXPIRED = Fault("the credentials have expired", f"renew them, {AGAIN}", None, renews=True)
KEY = Fault("the credentials are refused", f"check the access key and its secret, {AGAIN}", 2, renews=True)
NO_CREDENTIALS = Fault(
    "there are no credentials", f"log in to the cloud or set them in the environment, {AGAIN}", 2, True
)
FORBIDDEN = Fault(
    "access is refused",
    f"allow these credentials to list, read, write and remove objects there, {AGAIN}",
    2,
    renews=True,
)
CLOCK = Fault(
    "the clock of this machine is wrong", f"set it (chronyc makestep, or timedatectl set-ntp true), {AGAIN}", 2
)
NO_BUCKET = Fault("there is no such bucket", "check its name, or create it", 0)
MISSING = Fault("there is no such object", "check the address", 0)
DISK_FULL = Fault("the disk is full", f"make room, {AGAIN}", 0)
STORAGE_FULL = Fault("the storage is full", f"make room there, {AGAIN}", 2)
PLACE = Fault("nothing can be written there", "check the address", 0)
OTHER = Fault("failed", f"look up this error of the storage, {AGAIN}", 5)

CODES = {
    NO_BUCKET: ("NoSuchBucket", "InvalidBucketName", "ContainerNotFound", "AccountNotFound"),
    CLOCK: ("RequestTimeTooSkewed", "RequestInTheFuture"),
    EXPIRED: ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired", "401"),
    KEY: ("InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch", "AuthenticationFailed", "400"),
    STORAGE_FULL: ("QuotaExceeded", "XMinioStorageFull", "507"),
    FORBIDDEN: (
        "AccessDenied", "AllAccessDisabled", "AccountProblem", "AuthorizationFailure", "AuthorizationPermissionMismatch", "403",
    ),
    BUSY: (
        "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "ServerBusy", "OperationTimedOut", "Throttling",
        "408", "429", "500", "502", "503", "504",
    ),
    MISSING: ("NoSuchKey", "BlobNotFound", "404"),
}  # fmt: skip
# Words in messages of errors that have no code.
TEXTS = {
    "clock with skew": CLOCK,
    "Token must be a short-lived token": CLOCK,
    "Request date header too old": CLOCK,
    "specified bucket does not exist": NO_BUCKET,
    "Forbidden: ": FORBIDDEN,  # gcsfs makes an OSError of 403, with these words and nothing else
    "Invalid bucket name": NO_BUCKET,
}
CLASSES = {
    "NoCredentialsError": NO_CREDENTIALS,
    "PartialCredentialsError": NO_CREDENTIALS,
    "DefaultCredentialsError": NO_CREDENTIALS,
    "RefreshError": EXPIRED,
    "CredentialRetrievalError": EXPIRED,
    "TokenRetrievalError": EXPIRED,
    "SSOError": EXPIRED,
    "ClientAuthenticationError": EXPIRED,
    "HTTPClientError": NETWORK,  # botocore's: no connection, one that closed, timeouts
    "ClientPayloadError": NETWORK,  # aiohttp's
    "ClientConnectionError": NETWORK,
    "IncompleteRead": NETWORK,
    "TransportError": NETWORK,
    "ServiceRequestError": NETWORK,
    "ServiceResponseError": NETWORK,
    "ResponseParserError": BUSY,  # botocore's, for an answer that is no XML
    "FileNotFoundError": MISSING,
    "PermissionError": FORBIDDEN,
    "IsADirectoryError": PLACE,
    "NotADirectoryError": PLACE,
    "FileExistsError": PLACE,
    "NotImplementedError": PLACE,
    "ConnectionError": NETWORK,
    "TimeoutError": NETWORK,
    "gaierror": NETWORK,
}


class StorageError(UserError):
    """A request to storage failed. Its line says where, the cause, the library's own words, and what to do."""

    def __init__(self, place: str, fault: Fault, reason: str, tried_s: float = 0.0):
        self.fault, self.cause = fault, f"{place}: {fault.words} ({reason})"
        tried = f", tried for {tried_s:.0f} s" if tried_s >= 1 else ""
        super().__init__(f"{self.cause}{tried}; {fault.advice}")


def diagnose(error: BaseException) -> Fault:
    """The cause of an error that a library of storage, or this machine's disk, has raised; OTHER if it is unknown."""
    chain = list(_chain(error))
    if any(getattr(each, "errno", None) in FULL for each in chain):
        return DISK_FULL
    for words, fault in TEXTS.items():
        if any(words in str(each) for each in chain):
            return fault
    # Checked before the codes, because aiohttp invents a status for some errors of the network.
    if any(CLASSES.get(cls.__name__) is NETWORK for cls in type(error).__mro__):
        return NETWORK
    faults = [fault for each in chain for code in _codes(each) for fault, known in CODES.items() if code in known]
    faults += [CLASSES[cls.__name__] for each in chain for cls in type(each).__mro__ if cls.__name__ in CLASSES]
    return next(iter(faults), OTHER)


def reason_of(error: BaseException) -> str:
    """The first line of the library's message."""
    words = str(getattr(error, "strerror", None) or error).strip()  # without the "[Errno 16]" that s3fs invents
    return words.splitlines()[0].rstrip(".") if words else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, its cause, the cause of that, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__  # not __context__, which may be an earlier error that was handled


def _codes(error: BaseException) -> Iterator[str]:
    """Yield the service's code and the HTTP status of an error of botocore, gcsfs or azure."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        yield str(response.get("Error", {}).get("Code"))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status != 400:  # S3 uses it for many causes
            yield str(status)
    for name in ("code", "error_code", "status", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, (int, str)):
            yield str(value)
