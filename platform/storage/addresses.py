"""Parse the addresses of files: local paths, file://, s3://, gs:// and hf:// URIs.

In a URI, `?` starts the options, so a ? in a name is written %3F and a % is written %25. An address with an invalid or
unknown part is rejected; no part is ignored. Not here: access to the files, see storage.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote

from animediffusion.platform.errors import FileError, StorageError
from animediffusion.platform.network import SCHEME
from animediffusion.platform.storage import s3
from animediffusion.platform.storage.fsspec_stores import PACKAGES
from animediffusion.platform.storage.local_files import expanded

OPTIONS = ("endpoint_override", "region", "scheme")
_SECRETS = ("access_key", "secret_key", "session_token", "password")
_S3 = re.compile(r"s3://(?P<bucket>[^/?]*)(?P<key>[^?]*)(?P<options>\?.*)?", re.DOTALL)
_FILE = re.compile(r"file:(?://(?P<host>[^/?]*))?(?P<path>/[^?]*)(?P<options>\?.*)?", re.DOTALL)


class Location(NamedTuple):
    """A parsed address; `bucket` is empty for a local path, and `path` starts with the bucket's name otherwise."""

    bucket: str
    path: str
    endpoint: str | None = None
    region: str | None = None
    scheme: str = ""
    """`gs` or `hf`; empty for local paths and s3://."""


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store, not a local path."""
    return uri.startswith(("s3://", "gs://", "hf://"))


def join(uri: str, *parts: str) -> str:
    """Append path parts to the path of `uri` and keep its options; characters in the parts have no special meaning."""
    if not is_remote(uri):
        return str(Path(parse(uri).path).joinpath(*parts))
    base, options = split_options(uri)
    names = [quote(part.rstrip("/"), safe="/ +=&,;:@!$'()~") for part in parts]
    return "/".join([base.rstrip("/"), *names]) + options


def split_options(uri: str) -> tuple[str, str]:
    """Return an address without its options, and the options with their question mark; a local path has no options."""
    base, mark, options = uri.partition("?") if is_remote(uri) else (uri, "", "")
    return base, mark + options


def parse(uri: str) -> Location:
    """Parse an address.

    Raises:
        StorageError: for an unknown scheme or option, credentials, a missing bucket, or a malformed address.
    """
    if not uri:
        raise StorageError("storage", "the path is empty", "give a local path or s3://bucket/path")
    scheme = SCHEME.match(uri)
    if scheme is None:
        return Location("", _absolute(uri))
    if scheme[0] == "file":
        return Location("", _absolute(_file_path(uri)))
    if scheme[0] == "s3":
        return _parse_s3(uri)
    if scheme[0] in PACKAGES:
        return _parse_other(uri, scheme[0])
    allowed = "give a local path or s3://BUCKET/PATH, gs:// or hf://"
    raise StorageError(_without_secrets(uri), f"scheme {scheme[0]!r} is not known", allowed)


def _absolute(path: str) -> str:
    return str(expanded(path).absolute())


def _file_path(uri: str) -> str:
    match = _FILE.fullmatch(uri)
    if match is None or match["host"] not in (None, "", "localhost"):
        raise StorageError(uri, "is not the URI of a file", "write file:///path, or the path alone")
    if match["options"] is not None:
        raise StorageError(uri, "has options, which only s3:// URIs have", "write a ? in a name as %3F")
    return unquote(match["path"], errors="surrogateescape")


def _parse_s3(uri: str) -> Location:
    match = _S3.fullmatch(uri)
    if match is None:
        raise StorageError(
            _without_secrets(uri), "is not an s3:// URI", "write s3://bucket/path, or ./s3:... for a file"
        )
    options = _options(uri, match["bucket"], match["options"])
    if not match["bucket"]:
        raise StorageError(uri, "does not name a bucket", "write s3://bucket/path")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", match["bucket"]):
        allowed = "letters, digits, dots and hyphens, then / and the path"
        raise StorageError(uri, f"{match['bucket']!r} is not the name of a bucket", allowed)
    return Location(
        match["bucket"], match["bucket"] + _key(uri, match["key"]), _endpoint(uri, options), options.get("region")
    )


def _parse_other(uri: str, scheme: str) -> Location:
    start, _, options = uri.removeprefix(f"{scheme}://").partition("?")
    bucket, slash, key = start.partition("/")
    if not bucket or not uri.startswith(f"{scheme}://"):
        raise StorageError(uri, "does not name a bucket", f"write {scheme}://bucket/path")
    if options:
        found = "has options, which only s3:// URIs have"
        raise StorageError(_without_secrets(uri), found, "write a ? in a name as %3F")
    return Location(bucket, bucket + _key(uri, slash + key), scheme=scheme)


def _key(uri: str, quoted: str) -> str:
    """Return the path in a bucket: empty, or a slash and a key without a trailing slash."""
    try:
        key = unquote(quoted, errors="strict").removesuffix("/")
    except UnicodeDecodeError as error:
        raise FileError(uri, "has a name that is not UTF-8", "rename the object") from error
    if "//" in key or key.endswith("/"):
        raise FileError(uri, "has an empty part between two slashes", "write one slash, or rename the object")
    return key


def _options(uri: str, bucket: str, text: str | None) -> dict[str, str]:
    values = parse_qs(text[1:], keep_blank_values=True) if text else {}
    if "@" in bucket or any(key in values for key in _SECRETS):
        allowed = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        raise StorageError(_without_secrets(uri), "has credentials in the URI", allowed)
    unknown = sorted(set(values or ([""] if text else [])) - set(OPTIONS))
    if unknown:
        allowed = f"one of {', '.join(OPTIONS)}; a ? in a name is written %3F"
        raise StorageError(uri, f"option {unknown[0]!r} is not known", allowed)
    for name, given in values.items():
        if len(given) != 1 or not given[0]:
            raise StorageError(
                uri, f"option {name!r} has {len(given) if given[0] else 'no'} values", "give it one value"
            )
    return {name: given[0] for name, given in values.items()}


def _endpoint(uri: str, options: dict[str, str]) -> str | None:
    """Return the store's address from the URI's options, else the address that boto3 is configured with."""
    given, scheme = options.get("endpoint_override"), options.get("scheme")
    if scheme is not None and (given is None or "://" in given or scheme not in ("http", "https")):
        raise StorageError(
            uri, f"scheme {scheme!r} cannot be used here", "endpoint_override=HOST:PORT with http or https"
        )
    if given is None:
        return s3.configured(uri)[0]
    return given if "://" in given else f"{scheme or 'https'}://{given}"


def _without_secrets(uri: str) -> str:
    base, mark, options = uri.partition("?")
    base = re.sub(r"//[^/@]*@", "//", base)
    kept = [one for one in options.split("&") if one.partition("=")[0] not in _SECRETS]
    return base + (mark if options and kept else "") + "&".join(kept)
