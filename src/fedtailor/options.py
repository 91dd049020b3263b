"""What an experiment names, found and checked: a kind in its registry, a function in a user's file, options against its signature."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedtailor.algorithms import ALGORITHMS
from fedtailor.core import Algorithm, Job
from fedtailor.errors import ConfigError, FedtailorError, first_line, nearest

CODE = ("loss", "server_opt", "aux")  # parameters of an algorithm that are functions: set in code, never in a file


def choose(registry: Mapping[str, Any], section: str, kind: str) -> Any:
    if kind not in registry:
        raise ConfigError(f"unknown {section}.kind '{kind}': {nearest(kind, registry)}")
    return registry[kind]


def algorithm_named(kind: str) -> Callable[..., Algorithm]:
    """A registered algorithm, or the function in a file of the user's own: "path/to/file.py:function".

    Raises:
        ConfigError: no such algorithm, file or function.
    """
    path, found, name = kind.rpartition(":")
    if not found:
        return choose(ALGORITHMS, "algorithm", kind)  # type: ignore[no-any-return]
    if not Path(path).is_file():
        raise ConfigError(f"algorithm.kind '{kind}': there is no file '{path}' (seen from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code may fail in any way
        raise ConfigError(f"algorithm.kind '{kind}': '{path}' cannot be imported: {_raised(error)}") from error
    if not callable(getattr(module, name, None)):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ConfigError(f"algorithm.kind '{kind}': '{path}' has no function '{name}': {nearest(name, functions)}")
    return own_algorithm(kind, getattr(module, name))


def own_algorithm(kind: str, function: Callable[..., Any]) -> Callable[..., Algorithm]:
    """A user's function whose mistakes are told in one line; its options are read from its own signature.

    Raises:
        ConfigError: its signature names a type that is not there; when called: it fails, or returns no Algorithm.
    """
    try:
        inspect.signature(function, eval_str=True)
    except Exception as error:
        raise ConfigError(f"algorithm.kind '{kind}': {_raised(error)}") from error

    @functools.wraps(function)
    def factory(job: Job, **options: Any) -> Algorithm:
        try:
            algorithm = function(job, **options)
        except FedtailorError:
            raise
        except Exception as error:
            raise ConfigError(f"algorithm.kind '{kind}': {_raised(error)}") from error
        if not isinstance(algorithm, Algorithm):
            raise ConfigError(
                f"algorithm.kind '{kind}' returned a {type(algorithm).__name__}: return an Algorithm (fedtailor.core)"
            )
        return algorithm

    return factory


def _raised(error: BaseException) -> str:
    """What a user's own code raised: the message alone (3, 'mu') would not say."""
    name, line = type(error).__name__, first_line(error)
    return line if line == name else f"{name}: {line}"


def checked(factory: Callable[..., Any], section: str, options: Mapping[str, Any], first: str) -> dict[str, Any]:
    """The options, if they are keywords of this factory and of its annotated types: the signature is the configuration.

    Raises:
        ConfigError: an unknown option (with the nearest), or a value of a wrong type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    known = {n: p for n, p in inspect.signature(factory, eval_str=True).parameters.items() if n not in (first, *CODE)}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return dict(options)
    out: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"unknown key '{section}.{name}' for {section}.kind '{factory.__name__}': "
                + (nearest(name, known) if known else "it has no options")
            )
        try:
            adapter = TypeAdapter(known[name].annotation, config=ConfigDict(arbitrary_types_allowed=True))
            out[name] = adapter.validate_python(value, strict=not isinstance(value, int))
        except ValidationError as error:
            problem = error.errors()[0]["msg"].replace("Input should be", "should be")
            raise ConfigError(f"'{section}.{name}' {problem} (got {value!r})") from error
    return out
