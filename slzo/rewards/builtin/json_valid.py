"""Reward for an answer that is JSON and follows a schema."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from slzo.rewards.answers import text_of
from slzo.utils.class_paths import format_error
from slzo.utils.files import expanded

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", re.DOTALL | re.IGNORECASE)


def json_valid(
    completions: Sequence[Any], schema: Mapping[str, Any] | str | Sequence[Any] | None = None, partial: float = 0.0
) -> list[float]:
    """1 if the answer is JSON that follows the schema, ``partial`` if it is JSON that does not, else 0.

    ``schema`` is a JSON schema or the path of a file with one, as an argument, or each row's own, as a field of that name;
    without one any JSON will do. An answer may stand between ``` marks. Schemas need jsonschema (pip install
    'slzo[rewards]').
    """
    is_shared = schema is None or isinstance(schema, str | Mapping)
    schemas: list[Any] = [schema] * len(completions) if is_shared else list(schema or ())
    return [_score(text_of(text), of_row, partial) for text, of_row in zip(completions, schemas, strict=True)]


def _check(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if the schema for all rows cannot be used."""
    schema = arguments.get("schema")
    if schema is None:
        return
    if not isinstance(schema, str | Mapping):
        raise ValueError(f"schema {schema!r} must be a JSON schema or the path of a file with one; correct it")
    try:
        _validator(schema if isinstance(schema, str) else json.dumps(schema))
    except ImportError as error:
        raise ValueError(f"schemas need jsonschema ({error}); pip install 'slzo[rewards]'") from None
    except Exception as error:  # jsonschema raises its own
        raise ValueError(f"schema {schema!r} cannot be used ({format_error(error)}); correct it") from None


json_valid.check = _check  # type: ignore[attr-defined]  # for slzo.rewards.calls.load_function


def _score(text: str, schema: Mapping[str, Any] | str | None, partial: float) -> float:
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    if schema is None:
        return 1.0
    return 1.0 if _validator(schema if isinstance(schema, str) else json.dumps(schema)).is_valid(value) else partial


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")  # Python's own parser takes NaN and Infinity


@cache
def _validator(schema: str) -> Any:
    from jsonschema.validators import validator_for

    text = schema if schema.lstrip().startswith("{") else expanded(schema).read_text(encoding="utf-8")
    content = json.loads(text)
    kind = validator_for(content)
    kind.check_schema(content)
    return kind(content)
