"""The master's register of the certificates that it issued: a readable file.

Only devices that are in it and not revoked are used. A device keeps its identity when its key and
certificate are replaced.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from tpirt.errors import IdentityError
from tpirt.identity.certificates import NAME_LIMIT, Certificate, clean_name
from tpirt.identity.folder import read, write_private
from tpirt.locks import Lock, lock

_FORMAT = 1
_DATE = "%Y-%m-%dT%H:%M:%SZ"
_PATIENCE_S, _RETRY_S = 5.0, 0.01


@dataclass(frozen=True)
class Member:
    """A device that was given a certificate.

    ``address`` is where it was met last and ``met`` when, empty if that is not known; ``revoked``
    is a date, empty if it is not.
    """

    name: str
    identity: str
    joined: str
    expires: str
    address: str = ""
    revoked: str = ""
    met: str = ""

    @property
    def days_left(self) -> int:
        """Days until the certificate ends, 0 if it has."""
        try:
            end = datetime.strptime(self.expires, _DATE).replace(tzinfo=UTC)
        except ValueError:
            return 0
        return max(0, (end - datetime.now(UTC)).days)


def _member(entry: dict[str, object], known: set[str]) -> Member:
    """Parse an entry; what a later version has besides is left out."""
    texts = {name: value for name, value in entry.items() if name in known}
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("expected texts")
    return Member(**texts)  # type: ignore[arg-type]


class Registry:
    """The register in one file."""

    def __init__(self, path: Path):
        self._path = path

    def members(self) -> list[Member]:
        """All devices, in the order in which they joined.

        Raises:
            IdentityError: the file is missing or damaged.
        """
        if (members := self._read()) is None:
            raise IdentityError(
                f"{self._path}: the register of devices is missing, so no device is used; restore "
                "it from a copy, or invite every device again with `tpirt cluster invite`"
            )
        return members

    def _read(self) -> list[Member] | None:
        """All devices; None if there is no file."""
        if (data := read(self._path)) is None:
            return None
        try:
            found = json.loads(data)
            if found["format"] != _FORMAT:
                raise ValueError
            known = {field.name for field in fields(Member)}
            return [_member(each, known) for each in found["members"]]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise IdentityError(
                f"{self._path}: not a register of members; restore it from a copy"
            ) from exc

    def rewrite(self) -> bool:
        """Write the register as it is, to know that it can be; an empty one if there is none.

        Returns:
            Whether there was one.

        Raises:
            IdentityError: it cannot be read or written.
        """
        there = self._path.exists()
        with self._changing():
            return there

    def find(self, name: str) -> Member:
        """Find a device by its name or identity; a revoked one only if no other has the name.

        Raises:
            IdentityError: there is none.
        """
        members = self.members()
        for each in sorted(members, key=lambda each: bool(each.revoked)):
            if name in (each.name, each.identity):
                return each
        names = ", ".join(each.name for each in members)
        known = f"known: {names}" if names else "no device has joined yet"
        raise IdentityError(f"no device named {name!r}; {known}")

    def check(self, certificate: Certificate) -> Member:
        """Find the device of a certificate.

        Raises:
            IdentityError: it is not in the register, or revoked.
        """
        identity = certificate.subject.identity
        for each in self.members():
            if each.identity == identity:
                if each.revoked:
                    raise IdentityError(
                        f"the certificate of {each.name} was revoked on {each.revoked[:10]}; "
                        "invite it again with `tpirt cluster invite`"
                    )
                return each
        raise IdentityError(
            f"its certificate ({certificate.name}, {identity}) is not in {self._path}; invite it "
            "again with `tpirt cluster invite`"
        )

    def add(
        self, name: str, issue: Callable[[str], Certificate], address: str
    ) -> tuple[Member, Certificate]:
        """Record a new device, whose certificate is issued under the name that it is given.

        A name that is taken gets a number; that of a revoked device is free.

        Raises: as ``issue``.
        """
        with self._changing() as members:
            certificate = issue(_free(name, _taken(members)))
            member = Member(
                certificate.name,
                certificate.subject.identity,
                joined=_now(),
                expires=_date(certificate.expires),
                address=address,
            )
            members.append(member)
        return member, certificate

    def check_free(self, name: str) -> None:
        """Raise IdentityError if a device that was not revoked has this name."""
        if clean_name(name) in _taken(self._read() or []):
            raise IdentityError(
                f"{name} is the name of a device of this cluster; choose another one, or give that "
                f"device up first with `tpirt cluster revoke {name}`"
            )

    def remove(self, identity: str) -> None:
        """Forget a device that did not finish joining."""
        with self._changing() as members:
            members[:] = [each for each in members if each.identity != identity]

    def revoke(self, name: str) -> Member:
        """Refuse a device from now on; one that is refused already keeps its date.

        Raises:
            IdentityError: there is none of that name.
        """
        return self._change(
            self.find(name).identity, lambda each: replace(each, revoked=each.revoked or _now())
        )

    def renewed(self, certificate: Certificate) -> Member:
        """Record a device's next certificate."""
        expires = _date(certificate.expires)
        return self._change(
            certificate.subject.identity, lambda each: replace(each, expires=expires)
        )

    def met(self, identity: str, address: str) -> Member:
        """Record where a device was met, now.

        Raises:
            IdentityError: there is none of that identity.
        """
        return self._change(identity, lambda each: replace(each, address=address, met=_now()))

    def _change(self, identity: str, change: Callable[[Member], Member]) -> Member:
        with self._changing() as members:
            for number, each in enumerate(members):
                if each.identity == identity:
                    members[number] = change(each)
                    return members[number]
        raise IdentityError(f"{self._path}: no device {identity}")

    @contextmanager
    def _changing(self) -> Iterator[list[Member]]:
        """Change the list while no other process does.

        Raises:
            IdentityError: another one does not finish, or the file cannot be written.
        """
        held = self._locked()
        try:
            members = self._read() or []
            yield members
            content = {"format": _FORMAT, "members": [asdict(each) for each in members]}
            write_private(self._path, json.dumps(content, indent=2).encode() + b"\n")
        finally:
            held.release()

    def _locked(self) -> Lock:
        until_s = time.monotonic() + _PATIENCE_S
        while (held := lock(self._path.parent)) is None:
            if time.monotonic() > until_s:
                raise IdentityError(f"{self._path}: another tpirt has been changing it; try again")
            time.sleep(_RETRY_S)
        return held


def _taken(members: Iterable[Member]) -> set[str]:
    return {each.name for each in members if not each.revoked}


def _free(name: str, taken: Container[str]) -> str:
    name = free = clean_name(name)
    for number in count(2):
        if free not in taken:
            break
        end = f"-{number}"
        free = name[: NAME_LIMIT - len(end)] + end
    return free


def _now() -> str:
    return _date(datetime.now(UTC))


def _date(when: datetime) -> str:
    return when.strftime(_DATE)
