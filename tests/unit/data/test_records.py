"""Documents on a disk that fails: nobody is told to delete what may be whole."""

import errno

import pytest

from realm_retro.data import records
from realm_retro.data.records import Records
from realm_retro.errors import UserError


class Source:
    """A dataset of one row that cannot be read."""

    def __init__(self, error):
        self._error = error

    def __len__(self):
        return 1

    def __getitem__(self, row):
        raise self._error


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.EIO, "x"), OSError),
        (OSError(errno.ESTALE, "x"), OSError),
        (OSError(errno.EMFILE, "x"), OSError),
        (RuntimeError("read: Input/output error"), OSError),
        (MemoryError(), MemoryError),
        (FileNotFoundError(errno.ENOENT, "x"), UserError),
        (RuntimeError("a bad block"), UserError),
    ],
)
def test_errors_of_the_disk_are_no_damage(tmp_path, monkeypatch, error, raised):
    def fail(paths):
        raise error

    with pytest.raises(raised) as reading:
        Records(tmp_path, Source(error))[0]
    monkeypatch.setattr(records, "ArrayRecordDataSource", fail)
    with pytest.raises(raised) as opening:
        Records.open(tmp_path, [records.shard_name(0)])
    for found in (reading.value, opening.value):
        assert ("delete" in str(found)) == (raised is UserError)
        assert raised is not OSError or found.filename == str(tmp_path)
