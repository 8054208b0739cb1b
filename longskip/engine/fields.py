"""Kinds of values that settings have, and what every group of settings is (no torch)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST = (1 << 31) - 1
"""Of any whole number: of one without end nothing could be made, or told, in a time that a user would wait."""


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` as text; a number is meant."""
    if isinstance(value, bool):
        raise ValueError("a number is meant, not true or false")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a whole number is meant, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST)]
Side = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=1 << 16)]
Few = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=1 << 12)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Rate = Annotated[float, BeforeValidator(_number), Field(ge=0.0, allow_inf_nan=False)]
Decay = Annotated[float, BeforeValidator(_number), Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Above = Annotated[float, BeforeValidator(_number), Field(gt=0.0, allow_inf_nan=False)]


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
