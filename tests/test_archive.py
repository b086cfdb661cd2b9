"""Runs that travel: equal after the round trip, refused after any change; and what gc may and may not delete."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunelab.runs import Checkpoint, Store, StoreError, archive, records
from prunelab.settings import Prune, Run

RUNS = [Run(seed=0), Run(seed=1, prune=Prune(method="dropnet", options={"k": 2}))]
WEEK = 8 * 86400


def save(writer):
    row = {"round": 0, "test_accuracy": 0.9}
    writer.save(Checkpoint({"w": np.ones(3)}, {}, [row], [{"round": 0, "epoch": 1, "train_loss": 0.5}]))


def complete(store, run):
    with store.claim(run) as writer:
        save(writer)
        removals = {"w": np.arange(3, dtype=np.int16)} if run.seed else None
        writer.finish({"w": np.full(3, run.seed, np.float32)}, {"w": np.array([True, False, True])}, removals)


def interrupt(store, run, reason=None):
    with store.claim(run) as writer:
        save(writer)
        if reason:
            writer.fail(reason)
    return store.root / f"{run.id}.partial"


def aged(path, seconds=WEEK):
    for entry in (path, *path.rglob("*")):
        os.utime(entry, (time.time() - seconds,) * 2)
    return path


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "runs")
    for run in RUNS:
        complete(store, run)
    return store


@pytest.fixture
def other(tmp_path):
    return Store(tmp_path / "other")


@pytest.fixture
def tar(store, tmp_path):
    archive.export(store, tmp_path / "runs.tar")
    return tmp_path / "runs.tar"


# ---- export, import ----


def test_what_is_imported_equals_what_was_exported(store, other, tar):
    report = archive.import_(other, tar)
    assert report == archive.Imported(new=sorted(run.id for run in RUNS), existing=[], busy=[])
    assert content(other.root) == content(store.root)
    for what in ("rounds", "epochs"):
        pd.testing.assert_frame_equal(getattr(other, what)(), getattr(store, what)())
    assert other.removals(RUNS[1])["w"].tolist() == [0, 1, 2]
    assert other.settings(RUNS[1]) == RUNS[1]


def test_equal_runs_give_equal_bytes(store, other, tar, tmp_path):
    archive.import_(other, tar)
    for path in other.root.rglob("*"):
        os.utime(path, (1, 1))
    archive.export(other, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == tar.read_bytes()


def test_runs_can_be_chosen_and_a_run_that_is_not_complete_is_refused(store, tmp_path):
    path = tmp_path / "one.tar"
    assert archive.export(store, path, [RUNS[0]]) == [RUNS[0].id]
    with tarfile.open(path) as tar:
        assert {name.split("/")[0] for name in tar.getnames()} == {"manifest.json", RUNS[0].id}
    before = path.read_bytes()
    interrupt(store, Run(seed=9))
    interrupt(store, Run(seed=10), reason="nan")
    with pytest.raises(StoreError, match="is partial: only complete runs can be exported"):
        archive.export(store, path, [RUNS[0], Run(seed=9)])
    assert path.read_bytes() == before
    assert len(archive.export(store, path)) == 2


@pytest.mark.parametrize("name", ["weights.safetensors", "epochs.parquet", "provenance.json"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:1])])
def test_a_damaged_run_is_met_at_export_not_on_the_other_machine(store, tmp_path, name, damage):
    damage(store.root / RUNS[0].id / name)
    with pytest.raises(StoreError, match=rf"{name} is (missing|damaged .*): 'prunelab runs check --repair' drops"):
        archive.export(store, tmp_path / "runs.tar")
    assert not (tmp_path / "runs.tar").exists()


def test_an_empty_store_has_nothing_to_export(other, tmp_path):
    with pytest.raises(StoreError, match="no complete run to export"):
        archive.export(other, tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_written_leaves_nothing(store, tmp_path):
    with pytest.raises(StoreError, match="cannot be written"):
        archive.export(store, tmp_path / "absent" / "x.tar")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="cannot be written"):
        archive.export(store, tmp_path / "folder")
    assert not list(tmp_path.rglob("*.part"))


def test_runs_that_are_there_stay_as_they_are(store, other, tar):
    complete(other, RUNS[0])
    before = content(other.root)
    report = archive.import_(other, tar)
    assert (report.new, report.existing) == ([RUNS[1].id], [RUNS[0].id])
    assert before.items() <= content(other.root).items()


def test_an_import_completes_interrupted_runs_but_leaves_those_in_training(other, tar):
    interrupt(other, RUNS[0])
    with other.claim(RUNS[1]) as writer:
        save(writer)
        report = archive.import_(other, tar)
        assert (report.new, report.busy) == ([RUNS[0].id], [RUNS[1].id])
        assert not writer.complete
    assert not (other.root / f"{RUNS[0].id}.partial").exists()
    assert archive.import_(other, tar).new == [RUNS[1].id]


def rebuilt(path, change):
    """Write the archive anew, each (name, data) through ``change``, which gives a list of members."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            for new, content in change(name, data):
                info = tarfile.TarInfo(new)
                if isinstance(content, str):
                    info.type, info.linkname = tarfile.SYMTYPE, content
                    tar.addfile(info)
                else:
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def manifest(change):
    """A change of the manifest's runs alone."""

    def changed(name, data):
        if name != "manifest.json":
            return [(name, data)]
        value = json.loads(data)
        change(value)
        return [(name, json.dumps(value).encode())]

    return changed


def forge(name, data):
    """A whole archive with right digests, in which one run has the settings of another."""
    run_id = RUNS[0].id
    settings = {"format": 1, "id": run_id, "run": Run(seed=7).asdict()}
    forged = json.dumps(settings).encode()
    if name == "manifest.json":
        value = json.loads(data)
        value["runs"][run_id]["settings.json"] = hashlib.sha256(forged).hexdigest()
        return [(name, json.dumps(value).encode())]
    return [(name, forged if name == f"{run_id}/settings.json" else data)]


def renamed(value, new):
    value["runs"][new] = value["runs"].pop(RUNS[0].id)


def put(value, name):
    value["runs"][RUNS[0].id][name] = "0" * 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n, d: [(n, d[:-1] + b"?" if n.endswith("masks.safetensors") else d)], "has another digest"),
        (lambda n, d: [(n, d), ("../evil", b"x")] if n == "manifest.json" else [(n, d)], "'../evil' does not belong"),
        (lambda n, d: [(n, d), ("/etc/evil", b"x")] if n == "manifest.json" else [(n, d)], "does not belong"),
        (lambda n, d: [(n, "/etc/passwd" if n.endswith("masks.safetensors") else d)], "does not belong"),
        (lambda n, d: [(n, d)] * (1 + n.endswith("masks.safetensors")), "does not belong"),
        (lambda n, d: [] if n.endswith("masks.safetensors") else [(n, d)], "is truncated"),
        (lambda n, d: [] if n == "manifest.json" else [(n, d)], "does not start with its manifest"),
        (lambda n, d: [(n, b"[]" if n == "manifest.json" else d)], "does not start with its manifest"),
        (lambda n, d: [(n, b"{" if n == "manifest.json" else d)], "does not start with its manifest"),
        (manifest(lambda value: value.update(format="prunelab runs 2")), "has format 'prunelab runs 2'"),
        (manifest(lambda value: renamed(value, "../../x-y-z-s0-00000000")), "is no run"),
        (manifest(lambda value: renamed(value, "x-y-z-s0-00000000")), "does not belong"),
        (manifest(lambda value: put(value, "../../evil")), "is no run, or lacks a file"),
        (manifest(lambda value: value["runs"][RUNS[0].id].pop("rounds.parquet")), "lacks a file"),
        (forge, "its settings are not those of none-mlp-mnist-s0"),
    ],
)
def test_a_changed_archive_is_refused_and_the_store_untouched(other, tar, tmp_path, change, says):
    complete(other, Run(seed=50))
    before = content(other.root)
    rebuilt(tar, change)
    outside = set(tmp_path.rglob("*"))
    with pytest.raises(StoreError) as caught:
        archive.import_(other, tar)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert str(tar) in message
    assert content(other.root) == before
    assert set(tmp_path.rglob("*")) == outside


def sized(name, size, kind=tarfile.REGTYPE, data=b"", **pax):
    """A member whose header claims ``size`` bytes, whatever follows."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = size, kind, {key: str(value) for key, value in pax.items()}
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def bomb():
    """Rows that take 40 kB and unpack to gigabytes."""
    sink = io.BytesIO()
    numbers = pa.array(np.zeros(2**21, np.int64))
    table = pa.table({"round": numbers, **{f"c{i}": pa.array(np.zeros(2**21)) for i in range(80)}})
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, row_group_size=2**21)
    return sink.getvalue()


def swapped(change):
    """A whole archive with right digests everywhere, in which the files of one run of format 1 are changed."""

    def build(members):
        run_id = RUNS[1].id
        own = {name.split("/")[1]: data for name, data in members.items() if name.startswith(run_id)}
        own["settings.json"] = json.dumps({"format": 1, "id": run_id, "run": RUNS[1].asdict()}).encode()
        change(own)
        runs = {run_id: {name: hashlib.sha256(data).hexdigest() for name, data in own.items()}}
        manifest = json.dumps({"format": "prunelab runs 1", "runs": runs}).encode()
        files = [("manifest.json", manifest), *((f"{run_id}/{name}", data) for name, data in own.items())]
        return b"".join(sized(name, len(data), data=data) for name, data in files)

    return build


def listed(rest):
    """The manifest of the archive, and then what ``rest`` makes of the name of its first file."""

    def build(members):
        data = members["manifest.json"]
        return sized("manifest.json", len(data), data=data) + rest(f"{RUNS[0].id}/epochs.parquet")

    return build


HOSTILE = {
    "a manifest of brackets": lambda _: sized("manifest.json", 10**6, data=b"[" * 10**6),
    "a manifest of 10 TB": lambda _: sized("manifest.json", 10**13),
    "a member of 10 TB": listed(lambda name: sized(name, 10**13)),
    "a sparse member of 10 TB": listed(
        lambda name: sized(
            name,
            0,
            **{
                "GNU.sparse.major": 0,
                "GNU.sparse.minor": 1,
                "GNU.sparse.size": 10**13,
                "GNU.sparse.map": f"{10**13},0",
            },
        )
    ),
    "an old sparse member": listed(lambda name: sized(name, 0, tarfile.GNUTYPE_SPARSE)),
    "a header of 10 TB": listed(lambda _: sized("x", 10**13, tarfile.XHDTYPE)),
    "a long name of 10 TB": listed(lambda _: sized("x", 10**13, tarfile.GNUTYPE_LONGNAME)),
    "a negative size": listed(lambda name: sized(name, -512)),
    "a hard link": listed(lambda name: sized(name, 0, tarfile.LNKTYPE, linkname="/etc/passwd")),
    "a device": listed(lambda name: sized(name, 0, tarfile.CHRTYPE)),
    "a pipe": listed(lambda name: sized(name, 0, tarfile.FIFOTYPE)),
    "a folder": listed(lambda name: sized(name, 0, tarfile.DIRTYPE)),
    "another path": listed(lambda name: sized("x", 3, data=b"abc", path=f"../../{name}")),
    "rows that are those of epochs": swapped(lambda own: own.update({"epochs.parquet": own["rounds.parquet"]})),
    "rows that unpack to gigabytes": swapped(lambda own: own.update({"rounds.parquet": bomb()})),
    "masks of another shape": swapped(
        lambda own: own.update({"masks.safetensors": records.encode_tensors({"w": np.ones((2, 2), bool)})})
    ),
    "masks of numbers": swapped(
        lambda own: own.update({"masks.safetensors": records.encode_tensors({"w": np.full(3, 0.5)})})
    ),
    "removals of another shape": swapped(
        lambda own: own.update({"removals.safetensors": records.encode_tensors({"round/w": np.ones(3, np.int16)})})
    ),
    "files that it lists itself": swapped(
        lambda own: own.update(
            {
                "settings.json": records.encode_json(
                    {**json.loads(own["settings.json"]), "format": 2, "files": {"../../../etc/passwd": ["0", 1]}},
                    seal=True,
                )
            }
        )
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_in_one_line(other, tar, tmp_path, what):
    with tarfile.open(tar) as archived:
        members = {member.name: archived.extractfile(member).read() for member in archived}
    tar.write_bytes(HOSTILE[what](members) + bytes(1024))
    outside, begun = set(tmp_path.rglob("*")), time.monotonic()
    with pytest.raises(StoreError) as caught:
        archive.import_(other, tar)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(tar) in str(caught.value)
    assert set(tmp_path.rglob("*")) - outside <= {other.root}
    assert list(other.root.iterdir()) == []
    assert time.monotonic() - begun < 20


def test_an_archive_from_before_there_were_digests_is_imported(other, tar):
    with tarfile.open(tar) as archived:
        members = {member.name: archived.extractfile(member).read() for member in archived}
    tar.write_bytes(swapped(lambda own: None)(members) + bytes(1024))
    assert archive.import_(other, tar).new == [RUNS[1].id]
    assert other.check(RUNS[1]) == "no digest (older)"


@pytest.mark.parametrize("cut", ["in the manifest", "between two files", "in the last file"])
def test_a_truncated_archive_is_refused(other, tar, cut):
    with tarfile.open(tar) as file:
        members = list(file)
    end = {
        "in the manifest": members[0].offset_data + 10,
        "between two files": members[4].offset,
        "in the last file": members[-1].offset_data + 10,
    }
    tar.write_bytes(tar.read_bytes()[: end[cut]])
    with pytest.raises(StoreError, match=r"damaged|truncated|does not start with its manifest"):
        archive.import_(other, tar)
    assert other.ids() == []


def test_other_formats_are_refused(other, tar, tmp_path):
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(tar.read_bytes()))
    (tmp_path / "text.tar").write_text("hello " * 500)
    (tmp_path / "empty.tar").touch()
    for name in ("zipped.tar", "text.tar", "empty.tar", "absent.tar", "."):
        with pytest.raises(StoreError) as caught:
            archive.import_(other, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert other.ids() == []


# ---- gc ----


def test_gc_says_what_it_would_free_and_frees_it(store):
    old = aged(interrupt(store, Run(seed=20)))
    interrupt(store, Run(seed=21))
    failed = interrupt(store, Run(seed=22), reason="nan")
    left = aged(store.root / RUNS[0].id)
    shutil.copy(old / "checkpoint.safetensors", left)  # as a process leaves it that is killed at the very end
    (store.root / ".import-abc").mkdir()
    aged(store.root / ".import-abc")
    (store.root / ".trash-abc").mkdir()
    aged(store.root / ".locks")
    before = content(store.root)

    found = {garbage.path: garbage for garbage in archive.gc(store)}
    assert {path.name: garbage.what for path, garbage in found.items()} == {
        old.name: "interrupted run",
        "checkpoint.safetensors": "checkpoint of a complete run",
        ".import-abc": "interrupted import or deletion",
    }
    assert found[old].bytes == sum(path.stat().st_size for path in old.iterdir())
    assert content(store.root) == before

    assert archive.gc(store, dry_run=False) == list(found.values())
    assert not any(path.exists() for path in found)
    assert {store.status(run) for run in RUNS} == {"complete"}
    assert store.status(Run(seed=21)) == "partial"
    assert [garbage.path for garbage in archive.gc(store, failed=True, dry_run=False)] == [failed]
    assert store.status(Run(seed=22)) == "missing"


def test_a_file_that_comes_and_goes_meanwhile_stops_nobody(store):
    """As the first copy of a checkpoint does while somebody trains."""
    partial = aged(interrupt(store, Run(seed=20)))
    over, part = threading.Event(), partial / "checkpoint.safetensors.part"

    def train():
        while not over.is_set():
            part.write_bytes(b"x")
            part.unlink()

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for _ in range(300):
            archive.gc(store)
            store.size(Run(seed=20))
    finally:
        over.set()
        trainer.join()
    part.symlink_to("gone")
    assert [garbage.path for garbage in archive.gc(store, days=0)] == [partial]
    assert records.tree_size(store.root / "gone") == 0


def test_gc_leaves_a_run_that_a_process_holds_however_old(store):
    with store.claim(Run(seed=20)) as writer:
        save(writer)
        aged(store.root)
        assert archive.gc(store, days=0, failed=True, dry_run=False) == []
        assert writer.checkpoint is not None


def test_gc_clears_the_locks_of_runs_that_are_gone(store):
    with contextlib.suppress(KeyboardInterrupt), store.claim(Run(seed=20)):
        raise KeyboardInterrupt
    lock = store.root / ".locks" / f"{Run(seed=20).id}.lock"
    assert lock.exists()
    assert archive.gc(store, dry_run=False) == []
    aged(store.root / ".locks")
    assert [garbage.what for garbage in archive.gc(store, dry_run=False)] == ["lock of no process"]
    assert not lock.exists()


def test_gc_of_a_store_that_is_not_there(tmp_path):
    assert archive.gc(Store(tmp_path / "none"), dry_run=False) == []
