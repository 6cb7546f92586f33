"""Detecting damage to a stage's record."""

from bessemer.runs.directory import damage, write_done
from bessemer.runs.files import read_json


def test_no_bit_of_a_stage_s_record_can_change_unnoticed(tmp_path):
    """With one bit of any byte flipped, or cut off anywhere, done.json is unreadable, damaged, or says the same."""
    (tmp_path / "samples.jsonl").write_text("{}\n")
    record = {"fingerprint": "ab" * 32, "inputs": {"corpus": "cd" * 32}}
    done = write_done(tmp_path, record, {"accuracy": 0.25, "kept": {1: 7, 10: 8}}, 1.5)
    path = tmp_path / "done.json"
    data, same = path.read_bytes(), 0
    for at in range(len(data)):
        for damaged in (data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :], data[:at]):
            path.write_bytes(damaged)
            found = read_json(path)
            if found is not None and not damage(tmp_path, found):
                assert {name: found[name] for name in done} == done
                same += 1
    assert same < 40, "white space, and the name of the checksum"
    path.write_bytes(data)
    assert read_json(path)["summary"] == done["summary"] and damage(tmp_path, read_json(path)) == ""
