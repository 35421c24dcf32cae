"""Files of rows: every kind read to the same rows, every folder to its splits."""

import gzip
import json
import lzma

from lib import rows
from lib.formats import needed

import pytest

ROWS = [
    {"prompt": "x?", "response": 'a "quoted", long\nanswer', "is_safe": True},
    {"prompt": "żółć 🎉", "response": "[{no list", "is_safe": False},
]


def write(path, text, opener=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wb") as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return path


def lines(found):
    return "".join(json.dumps(row) + "\n" for row in found)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", lines(ROWS)),
        ("A.JSONL", lines(ROWS)),
        ("a.json", lines(ROWS)),
        ("a.Json", b"\xef\xbb\xbf" + lines(ROWS).encode()),
        ("a.jsonl", "\n\n" + lines(ROWS).replace("\n", "\r\n\n")),
        ("a.json", json.dumps(ROWS)),
        ("a.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2).encode()),
        ("a.jsonl.gz", gzip.compress(lines(ROWS).encode(), mtime=0)),
        ("a.JSON.XZ", lzma.compress(json.dumps(ROWS).encode())),
    ],
)
def test_json_in_every_shape_is_the_same_rows(tmp_path, name, text, monkeypatch):
    for at_once in (4, 7, 2**20):
        monkeypatch.setattr(rows, "AT_ONCE", at_once)
        read = list(rows.read_rows(write(tmp_path / name, text)))
        assert [row for row, _ in read] == ROWS
        assert all(str(tmp_path / name) in place for _, place in read)


def test_csv_cells_are_texts(tmp_path):
    path = write(tmp_path / "a.CSV", '\ufeffprompt,n\r\n"a\nb",1\r\n,\r\n\r\n"[{""a"": 1}]",2\r\n')
    assert list(rows.read_rows(path)) == [
        ({"prompt": "a\nb", "n": "1"}, f"{path}:2"),
        ({"prompt": "", "n": ""}, f"{path}:4"),
        ({"prompt": '[{"a": 1}]', "n": "2"}, f"{path}:5"),
    ]


def test_only_needed_columns_are_read(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,response,is_safe,more\nx,y,1,[{'python': 1}]\n")
    assert [row for row, _ in rows.read_rows(path, needed)] == [
        {"prompt": "x", "response": "y", "is_safe": "1"}
    ]
    path = write(tmp_path / "b.csv", "instruction,prompt\nx,y\n")
    assert [row for row, _ in rows.read_rows(path, needed)] == [{"instruction": "x", "prompt": "y"}]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", '[{"a": 1}, {"a": 2', "object 2: not valid JSON"),
        ("a.json", '[{"a": 1}, 5]', "object 2: holds 5; expected a JSON object"),
        (
            "a.json",
            '[{"a": 1}, {"a": 1, "a": 2}]',
            'object 2: JSON that cannot be .*"a" is given twice',
        ),
        ("a.json", '[{"a": ' + "[" * 200 + "]" * 200 + "}]", "object 1: JSON nested more than"),
        ("a.json", '{\n"a": 1}', "a.json:1: not valid JSON"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv:2: has more cells than the heading"),
        ("a.csv", 'a,b\n1,"2', "a.csv:2: not valid CSV"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv: two columns are called a; expected one"),
        ("a.csv", "a;b\n1;2\n", "a.csv:1: the heading has semicolons; expected commas"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', "goes on behind its array"),
        ("a.jsonl", '[{"a": 1}] more', "goes on behind its array"),
        ("a.csv", b"a,b\n1,\xff\n", "a.csv: not UTF-8"),
        ("a.txt", "", "unknown kind of file; expected .jsonl, .json, .csv"),
        ("a.parquet.gz", "", "unknown kind of file"),
        ("a.gz", "", "unknown kind of file"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        list(rows.read_rows(write(tmp_path / name, text)))


@pytest.mark.parametrize(
    "names, train, test",
    [
        ("train.jsonl test.jsonl", "train.jsonl", "test.jsonl"),
        ("Train.JSON Test.JSON", "Train.JSON", "Test.JSON"),
        ("data/train-0-of-2.jsonl data/train-1-of-2.jsonl data/test.csv.gz",
         "data/train-0-of-2.jsonl data/train-1-of-2.jsonl", "data/test.csv.gz"),
        ("train/0.jsonl test/0.jsonl", "train/0.jsonl", "test/0.jsonl"),
        ("my_train.jsonl my_validation.jsonl", "my_train.jsonl", "my_validation.jsonl"),
        ("train.jsonl dev.jsonl test.jsonl", "train.jsonl", "test.jsonl"),
        ("a/train.jsonl b/train.jsonl", "a/train.jsonl b/train.jsonl", None),
        ("A-7B/train.jsonl A2-7B/train.jsonl", "A-7B/train.jsonl A2-7B/train.jsonl", None),
        ("round0.json dataset_infos.json", "round0.json", None),
        ("latest.jsonl contest.csv", "contest.csv latest.jsonl", None),
        ("trainset.jsonl testset.csv", "trainset.jsonl", "testset.csv"),
        ("myTrain.jsonl myTest.jsonl", "myTrain.jsonl", "myTest.jsonl"),
        ("red_test_train.jsonl red_test_test.jsonl", "red_test_train.jsonl", "red_test_test.jsonl"),
        ("trainval.json dev/test.json", "trainval.json", "dev/test.json"),
        ("train.jsonl other.jsonl .cache/train.jsonl notes.txt", "train.jsonl", None),
    ],
)  # fmt: skip
def test_folders_are_split_by_names(tmp_path, names, train, test):
    for name in names.split():
        write(tmp_path / name, "")
    found = rows.find_files(tmp_path)
    inside = {
        split: [str(p.relative_to(tmp_path)) for p in paths] for split, paths in found.items()
    }
    assert inside == {"train": train.split()} | ({"test": test.split()} if test else {})


@pytest.mark.parametrize(
    "names",
    [
        "train.jsonl.gz train.jsonl.xz",
        "train.jsonl train.csv",
        "train.JSONL a/test.json a/test.jsonl.gz",
        "round0/30k/train.jsonl round0/330k/train.jsonl.xz",
        "train_30k.jsonl train_330K.jsonl",
        "PKU-SafeRLHF-10K/round0.json PKU-SafeRLHF-30K/round0.json",
    ],
)
def test_the_same_rows_twice_are_refused(tmp_path, names):
    for name in names.split():
        write(tmp_path / name, "")
    with pytest.raises(ValueError, match="rows of .* once more, or another size of the same set"):
        rows.find_files(tmp_path)


def test_what_save_to_disk_wrote_is_refused_with_its_remedy(tmp_path):
    for name in ("train/data-00000-of-00001.arrow", "train/state.json", "dataset_dict.json"):
        write(tmp_path / name, "{}")
    with pytest.raises(ValueError, match="no train file; .* to_parquet writes it instead of"):
        rows.find_files(tmp_path)


def test_a_folder_without_rows_to_train_on(tmp_path):
    for name in ("notes.txt", ".hidden/train.jsonl"):
        write(tmp_path / "none" / name, "")
    with pytest.raises(ValueError, match="no train file; expected .jsonl"):
        rows.find_files(tmp_path / "none")
    write(tmp_path / "judge" / "test.jsonl", "")
    assert rows.find_files(tmp_path / "judge").keys() == {"test"}, "enough to judge a run by"
