"Tables that several sittings fill: a row that is there is not made again."

import time
from pathlib import Path

from kalm.core.files import append_csv, read_csv


def there(path: Path, **key) -> bool:
    "Whether a table has a row with these values."
    return any(all(row.get(k) == str(v) for k, v in key.items()) for row in read_csv(path))


def add(path: Path, row: dict, began: float | None = None) -> None:
    "Append a row under the table's own columns, numbers to four digits, `began` as seconds; print it too."
    if began is not None:
        row = row | dict(seconds=round(time.monotonic() - began, 1))
    row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    old = read_csv(path)
    columns = list(old[0]) if old else list(row)
    unknown = set(row) - set(columns)
    if unknown:
        raise ValueError(f"{path} has no column {', '.join(sorted(unknown))}")
    append_csv(path, {c: row.get(c, "") for c in columns})
    print(row, flush=True)
