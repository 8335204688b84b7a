"""Locks on files: held by one run, done without where the file system has none."""

import errno
import fcntl
import os

import pytest
from absl import logging

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import only_one


def test_a_second_run_is_refused(tmp_path):
    path = tmp_path / "lock"
    with only_one(path), pytest.raises(UserError, match="Another run holds"), only_one(path):
        pass
    with only_one(path):
        pass


@pytest.fixture
def refusal(monkeypatch):
    """Returns a function after which files are locked with that error."""

    def put(number):
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return put


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_and_says_so_once(refusal, number, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "log_first_n", lambda level, text, n, *values: told.append((n, text % values)))
    refusal(number)
    with only_one(tmp_path / "lock"):
        pass
    text = f"{tmp_path}/lock cannot be locked ({os.strerror(number)}): see to it that no other run writes there"
    assert told == [(1, text)]


def test_another_error_is_raised(refusal, tmp_path):
    refusal(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), only_one(tmp_path / "lock"):
        pass
