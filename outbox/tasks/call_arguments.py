"""The arguments of a call: what travels, and what comes back.

The body of a task is ``{"args": [...], "kwargs": {...}}``, without what is empty. Values that
aren't JSON's own are named in ``"typed"``, by position or name: these, and no others, are read by
the annotations of their parameters.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from outbox.errors import InvalidEvent, UsageError
from outbox.tasks.codec import REFUSALS, Codec, codec_of, is_plain, is_same
from outbox.tasks.mapped import Writing, may_be_mapped

__all__ = ["DoesNotFit", "Parameters", "parameters_of"]

_SCALARS = frozenset((int, str, float, bool, types.NoneType))
_CONTAINERS = frozenset((list, dict))


class DoesNotFit(Exception):
    """Arguments in a message don't fit the function; the text says why."""


class Parameters:
    """The parameters of a function, or of a method with its instance as the first.

    Attributes:
        signature: the signature, without the session.
        takes_session: whether the worker adds a parameter ``session``, annotated as a session of
            SQLAlchemy.
        owner: the class whose instance is the first argument, or None.
    """

    def __init__(self, function: Callable[..., Any], name: str, owner: type | None = None) -> None:
        """Read the signature.

        Args:
            function: a plain function.
            name: how it is called, for messages.
            owner: the class whose instance is its first argument, or None.
        """
        self._function = function
        self._name = name
        self.owner = owner
        self.signature = inspect.signature(function)
        self.takes_session = _takes_session(function, self.signature)
        if self.takes_session:
            self.signature = _without_session(self.signature)
        parameters = self.signature.parameters.values()
        positional = [
            parameter
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        self._names = [parameter.name for parameter in positional]
        self._positional: list[tuple[int | str, str]] = list(enumerate(self._names))
        self._most = len(positional)
        self._is_resolved = False
        self._codecs: dict[str, Codec] = {}
        of_kind = {parameter.kind: parameter.name for parameter in parameters}
        self._rest_of_args = of_kind.get(inspect.Parameter.VAR_POSITIONAL, "")
        self._rest_of_kwargs = of_kind.get(inspect.Parameter.VAR_KEYWORD, "")
        self._keywords = frozenset(
            parameter.name
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        )
        required = {
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }
        # Behind how many positional arguments which others must be given by name.
        self._required = [
            frozenset(required.difference(self._names[:count]))
            for count in range(len(positional) + 1)
        ]

    @functools.cached_property
    def hints(self) -> Mapping[str, Any]:
        """The annotations of the parameters, resolved.

        Raises:
            UsageError: one of them names what the module doesn't have when it runs.
        """
        try:
            hints = typing.get_type_hints(self._function, include_extras=True)
        except NameError as error:
            raise UsageError(
                f"an annotation of {self._name} can't be resolved: {error}; a task needs it when "
                "it runs, so don't import it under TYPE_CHECKING alone"
            ) from None
        if self.owner is not None:
            first = next(iter(self.signature.parameters), None)
            if first is not None:
                hints.setdefault(first, self.owner)
        return hints

    @property
    def required(self) -> list[str]:
        """The names of the parameters that have no default."""
        return [name for name in self.signature.parameters if name in self._required[0]]

    def _codec_of(self, parameter: str) -> Codec:
        codec = self._codecs.get(parameter)
        if codec is None:
            codec = self._codecs[parameter] = codec_of(self.hints.get(parameter, Any))
        return codec

    def written(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], transaction: Any = None
    ) -> dict[str, Any]:
        """Return the body of a call.

        Args:
            args: the positional arguments.
            kwargs: the keyword arguments.
            transaction: what the transaction that stores the task is known by, or None; see
                ``outbox.tasks.mapped.Writing``.

        Raises:
            InvalidEvent: the arguments don't fit the function, or one can't be carried without a
                change.
            UsageError: an annotation can't be resolved.
        """
        if not self._is_resolved:
            self.hints  # noqa: B018  one that can't be resolved would fail in the worker
            self._is_resolved = True
        fits = self._fits(args, kwargs)
        if fits and not kwargs and _SCALARS.issuperset(map(type, args)):
            return {"args": args}
        try:
            places = self._places(args, kwargs, fits=fits)
        except TypeError as error:
            raise InvalidEvent(
                f"the arguments of {self._name}{self.signature} don't fit: {error}"
            ) from None
        typed: list[int | str] = []
        values = [*args, *kwargs.values()]
        if may_be_mapped():
            with Writing(transaction):
                self._write_all(places, values, typed)
        else:
            self._write_all(places, values, typed)
        body: dict[str, Any] = {"args": values[: len(args)]}
        if kwargs:
            body["kwargs"] = dict(zip(kwargs, values[len(args) :], strict=True))
        if typed:
            body["typed"] = typed
        return body

    def plain(self, args: Sequence[Any]) -> dict[str, Any]:
        """Return the body of a call with these values of JSON's own types; see :meth:`written`."""
        if self._is_resolved and len(args) <= self._most and not self._required[len(args)]:
            return {"args": args}
        return self.written(args, {})

    def _fits(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether the arguments certainly fit, without binding them, which takes longer."""
        names, count = self._names, len(args)
        if count > len(names):
            return not kwargs and self._rest_of_args != "" and not self._required[-1]
        if not kwargs:
            return not self._required[count]
        given = kwargs.keys()
        return (
            given <= self._keywords
            and given.isdisjoint(names[:count])
            and self._required[count] <= given
        )

    def _write_all(
        self, places: Sequence[tuple[int | str, str]], values: list[Any], typed: list[int | str]
    ) -> None:
        """Write ``values`` in place."""
        for number, (place, parameter) in enumerate(places):
            value = values[number]
            if type(value) not in _SCALARS:
                values[number] = self._write(place, parameter, value, typed)

    def _write(self, place: int | str, parameter: str, value: Any, typed: list[int | str]) -> Any:
        try:
            if type(value) in _CONTAINERS and is_plain(value):
                return value
            codec = self._codecs.get(parameter) or self._codec_of(parameter)
            encoded, again = codec.carry(value)
            if again is not value and not is_same(value, again):
                raise ValueError(
                    f"its annotation brings it back as {again!r:.60}, a {type(again).__qualname__}"
                )
        except InvalidEvent as error:
            raise InvalidEvent(f"the argument {parameter!r} of {self._name}: {error}") from None
        except REFUSALS as error:
            raise InvalidEvent(
                f"the argument {parameter!r} of {self._name} can't be carried: {value!r:.60}: "
                f"{error}"
            ) from error
        typed.append(place)
        return encoded

    def _places(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], *, fits: bool
    ) -> list[tuple[int | str, str]]:
        """Return the place and the parameter of each argument; ``fits`` is what ``_fits`` said.

        Raises:
            TypeError: they don't fit the function.
        """
        if not fits:
            self.signature.bind(*args, **kwargs)
        places = self._positional[: len(args)]
        if len(places) < len(args):
            places += [(place, self._rest_of_args) for place in range(len(places), len(args))]
        for name in kwargs:
            places.append((name, name if name in self._keywords else self._rest_of_kwargs))
        return places

    def read(self, body: Any) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments in a message's body.

        Raises:
            DoesNotFit: it isn't the body of a call, or not of one that the function takes.
            Exception: a reader of mapped instances raised it.
        """
        args, kwargs, typed = parts_of(body)
        fits = self._fits(args, kwargs)
        if not typed and fits:
            return args, kwargs
        try:
            places = self._places(args, kwargs, fits=fits)
        except TypeError as error:
            raise DoesNotFit(
                f"the arguments don't fit {self._name}{self.signature}: {error}"
            ) from None
        for place, parameter in places:
            if place in typed:
                holder: Any = args if isinstance(place, int) else kwargs
                holder[place] = self._read(parameter, holder[place])
        return args, kwargs

    def result_written(self, value: Any) -> tuple[Any, bool]:
        """Return what JSON carries instead of a result, and whether it is needed to read it.

        Raises:
            TypeError, ValueError, LookupError, ArithmeticError: it can't be carried unchanged.
        """
        if type(value) in _SCALARS or is_plain(value):
            return value, False
        encoded, again = self._codec_of("return").carry(value)
        if again is not value and not is_same(value, again):
            raise ValueError(f"its annotation brings it back as a {type(again).__qualname__}")
        return encoded, True

    def result_read(self, value: Any) -> Any:
        """Return a result that needs its annotation.

        Raises:
            TypeError, ValueError, LookupError, ArithmeticError: it isn't such a result.
        """
        return self._codec_of("return").decode(value)

    def _read(self, parameter: str, value: Any) -> Any:
        try:
            return self._codec_of(parameter).decode(value)
        except (*REFUSALS, RecursionError) as error:
            raise DoesNotFit(
                f"the argument {parameter!r} of {self._name} can't be read: {error}"
            ) from None


def _takes_session(function: Callable[..., Any], signature: inspect.Signature) -> bool:
    """Return whether the parameter ``session`` is annotated as a session of SQLAlchemy."""
    parameter = signature.parameters.get("session")
    if parameter is None or parameter.kind is parameter.POSITIONAL_ONLY:
        return False
    kinds = _session_kinds()
    if not kinds or parameter.annotation is parameter.empty:
        return False

    def alone() -> None: ...

    alone.__annotations__ = {"session": parameter.annotation}
    inner: Any = inspect.unwrap(getattr(function, "__func__", function))
    try:
        hint = typing.get_type_hints(alone, inner.__globals__)["session"]
    except Exception:  # all annotations are resolved later, with an error that names this one
        return False
    members = typing.get_args(hint) or (hint,)
    return any(isinstance(kind, type) and issubclass(kind, kinds) for kind in members)


def _session_kinds() -> tuple[type, ...]:
    """Return SQLAlchemy's classes of sessions, as far as they are imported."""
    found = (
        getattr(sys.modules.get("sqlalchemy.orm"), "Session", None),
        getattr(sys.modules.get("sqlalchemy.ext.asyncio"), "AsyncSession", None),
    )
    return tuple(kind for kind in found if kind is not None)


def _without_session(signature: inspect.Signature) -> inspect.Signature:
    kept = [each for name, each in signature.parameters.items() if name != "session"]
    return signature.replace(parameters=kept)


def parts_of(body: Any) -> tuple[list[Any], dict[str, Any], set[int | str]]:
    """Return the arguments in a body, and which of them are typed.

    Raises:
        DoesNotFit: it isn't the body of a call.
    """
    if type(body) is not dict:
        raise DoesNotFit("the body of a task must be an object with args and kwargs")
    args, kwargs, typed = body.get("args", []), body.get("kwargs", {}), body.get("typed", [])
    if type(args) is not list or type(kwargs) is not dict or type(typed) is not list:
        raise DoesNotFit("args and typed of a task must be lists, and kwargs an object")
    places = {place for place in typed if type(place) in (int, str)}
    return args, kwargs, places


@functools.lru_cache(maxsize=1024)
def parameters_of(function: Callable[..., Any], name: str, owner: type | None = None) -> Parameters:
    """Return the parameters of a function, read once."""
    return Parameters(function, name, owner)
