"""Errors between processes: what one raises is what the other reads."""

from __future__ import annotations

import inspect
import pickle

import pytest

from longskip import errors
from longskip.errors import BadSampleError, ConfigError, LongskipError, TextTooLongError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LongskipError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_comes_through_a_pipe_as_it_was(kind: type[LongskipError]) -> None:
    error = kind("image_decode", "cut short") if kind is BadSampleError else kind("cut short", cure="pack it again")
    error.alike = True
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
    assert again.__dict__ == error.__dict__ and again.exit_code == error.exit_code


def test_the_reason_of_a_bad_sample_comes_along() -> None:
    assert pickle.loads(pickle.dumps(TextTooLongError("18 tokens", cure="16 at most"))).reason == "text_too_long"
    with pytest.raises(ConfigError, match="value"):
        raise pickle.loads(pickle.dumps(ConfigError("a value")))
