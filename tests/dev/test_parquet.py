"""Parquet, and data sets as the libraries of others write them."""

import json
import random

from lib import formats, records, rows

import pyarrow
import pytest
from pyarrow import parquet

ROWS = [
    {
        "prompt": f"prompt {i}?",
        "response_0": "yes",
        "response_1": "żółć 🎉\n",
        "is_response_0_safe": i % 2 == 0,
        "is_response_1_safe": i % 3 == 0,
        "better_response_id": i % 2,
        "safer_response_id": 0,
        "categories": {"violence": None},
        "score": float("nan"),
    }
    for i in range(2500)
]


LABELS = {"chosen_safe": True, "rejected_safe": False}


def expected(found=ROWS):
    return [formats.pku_saferlhf(row, "", None) for row in found]


def read(path):
    return list(records.read_file(path, records.Counter()))


def test_parquet_is_read_as_json_lines_are(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "Train.PARQUET")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:9]), tmp_path / "test-0-of-1.parquet")
    splits = records.load(tmp_path)
    assert list(splits["train"]) == expected() and list(splits["test"]) == expected(ROWS[:9])
    *_, (row, place) = rows.read_rows(tmp_path / "Train.PARQUET")
    assert place.endswith("Train.PARQUET:2500") and row["categories"] == {"violence": None}


def test_a_broken_parquet_file_is_named(tmp_path):
    for content in (b"", b"PAR1", b"PAR1 and no more PAR1"):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(ValueError, match="a.parquet: cannot be read as Parquet"):
            read(tmp_path / "a.parquet")


def test_damage_is_one_line_that_names_the_file(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:200]), tmp_path / "whole.parquet")
    whole, generator, named = (tmp_path / "whole.parquet").read_bytes(), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for i in generator.sample(range(len(damaged)), 4):
            damaged[i] ^= 0xFF
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            read(tmp_path / "a.parquet")
        except ValueError as e:
            named += 1
            assert "a.parquet" in str(e) and "\n" not in str(e)
    assert named > 20
    parquet.write_table(
        pyarrow.Table.from_pylist([{**ROWS[0], "better_response_id": b"1"}]), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="a.parquet:1: better_response_id is .*; expected 0 or 1"):
        read(tmp_path / "a.parquet")


def test_what_datasets_and_pandas_write(tmp_path):
    """Each way in which these libraries put a data set on the disk, but for Arrow's own."""
    import datasets

    data_set = datasets.Dataset.from_list(ROWS[:50])
    data_set.to_parquet(tmp_path / "a.parquet")
    data_set.to_json(tmp_path / "a.jsonl")
    data_set.to_json(tmp_path / "a.json", lines=False)
    data_set.to_csv(tmp_path / "a.csv")
    frame = data_set.to_pandas()
    frame.to_json(tmp_path / "b.json", orient="records")
    frame.to_json(tmp_path / "b.jsonl.gz", orient="records", lines=True)
    frame.to_csv(tmp_path / "b.csv.xz")
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == expected(ROWS[:50]), path


def test_one_message_as_an_answer_survives_csv(tmp_path):
    """`datasets` writes it as Python prints it, which is refused and not trained on as text."""
    import datasets

    answer = {"role": "assistant", "content": "yes"}
    shape = {"prompt": "x?", "chosen": answer, "rejected": answer, **LABELS}
    datasets.Dataset.from_list([shape]).to_csv(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="a.csv:2: chosen seems to be messages, and is not JSON"):
        read(tmp_path / "a.csv")
    parquet.write_table(
        pyarrow.Table.from_pylist([{**shape, "chosen": json.dumps(answer), "rejected": "no"}]),
        tmp_path / "a.parquet",
    )
    assert read(tmp_path / "a.parquet") == [formats.Record("x?", "yes", "no", True, False, 0, 0)]


def test_messages_in_parquet_and_in_csv(tmp_path):
    chat = lambda role, text: [{"role": role, "content": text}]
    shape = {
        "prompt": chat("user", "x?"),
        "chosen": chat("assistant", "yes"),
        "rejected": chat("assistant", "no"),
        **LABELS,
    }
    parquet.write_table(pyarrow.Table.from_pylist([shape]), tmp_path / "a.parquet")
    quoted = (json.dumps(v).replace('"', '""') for v in shape.values())
    row = ",".join(f'"{cell}"' for cell in quoted)
    (tmp_path / "a.csv").write_text(",".join(shape) + "\n" + row + "\n")
    for name in ("a.parquet", "a.csv"):
        assert read(tmp_path / name) == [formats.Record("x?", "yes", "no", True, False, 0, 0)]
