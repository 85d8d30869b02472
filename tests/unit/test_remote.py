"""Committed directories on remote storage: a folder reached by file://, and S3 as moto's server plays it."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs as filesystems

from rxt_platform.errors import ArtifactError
from rxt_platform.storage.directory import MANIFEST, commit_directory, verify_directory
from rxt_platform.storage.remote import RemoteFolder

KIND = "resume_state"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Host and port of an S3 server of this process."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


def s3(endpoint: str, path: str) -> str:
    """URI of a folder on the server, with keys that no message may show."""
    return f"s3://someone:a-secret@{path}?scheme=http&region=us-east-1&endpoint_override={endpoint}"


def client(endpoint: str) -> Any:
    """Another way to the same server."""
    return boto3.client(
        "s3",
        endpoint_url=f"http://{endpoint}",
        region_name="us-east-1",
        aws_access_key_id="someone",
        aws_secret_access_key="a-secret",
    )


class Bucket:
    """What a remote folder holds, seen without RemoteFolder."""

    def __init__(self, kind: str, folder: Path, endpoint: str) -> None:
        self.folder, self.s3 = folder, None if kind == "file" else client(endpoint)
        self.name = f"bucket-{abs(hash(folder)):x}"
        if self.s3 is not None:
            self.s3.create_bucket(Bucket=self.name)
        self.uri = f"file://{folder}" if self.s3 is None else s3(endpoint, f"{self.name}/some/where")

    def write(self, name: str, content: bytes) -> None:
        """Put a file there."""
        if self.s3 is not None:
            self.s3.put_object(Bucket=self.name, Key=f"some/where/{name}", Body=content)
        else:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)

    def delete(self, name: str) -> None:
        """Remove a file there."""
        if self.s3 is not None:
            self.s3.delete_object(Bucket=self.name, Key=f"some/where/{name}")
        else:
            (self.folder / name).unlink()

    def files(self) -> list[str]:
        """All that is there."""
        if self.s3 is None:
            return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
        objects = self.s3.list_objects_v2(Bucket=self.name).get("Contents", [])
        return sorted(one["Key"].removeprefix("some/where/") for one in objects if not one["Key"].endswith("/"))


@pytest.fixture(params=["file", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, endpoint: str) -> Bucket:
    """An empty remote folder."""
    return Bucket(request.param, tmp_path / "remote", endpoint)


def committed(folder: Path, name: str, **files: str) -> Path:
    """A directory with a manifest."""
    with commit_directory(folder / name, KIND) as new:
        for path, text in files.items():
            target = new / path.replace("__", "/")
            target.parent.mkdir(exist_ok=True)
            target.write_text(text)
    return folder / name


def test_what_goes_up_comes_down_the_same(bucket: Bucket, tmp_path: Path) -> None:
    here = committed(tmp_path / "here", "step-00000003", a="one", sub__b="two" * 100_000)
    remote = RemoteFolder(bucket.uri)
    assert remote.complete() == [], "a folder that is not there yet is an empty one"
    remote.upload(here)
    assert RemoteFolder(bucket.uri).complete() == [here.name]
    back = tmp_path / "back" / here.name
    remote.download(here.name, back, KIND)
    assert verify_directory(back, KIND) == verify_directory(here, KIND)
    assert (back / "sub/b").read_text() == "two" * 100_000


def test_without_its_manifest_a_directory_is_not_there(bucket: Bucket, tmp_path: Path) -> None:
    """So one whose copy was cut off is never used: the manifest goes last."""
    remote = RemoteFolder(bucket.uri)
    for step in (3, 6):
        remote.upload(committed(tmp_path / "here", f"step-{step:08d}", a="one"))
    bucket.delete(f"step-00000006/{MANIFEST}")
    assert remote.complete() == ["step-00000003"]
    with pytest.raises(ArtifactError, match=f"step-00000006: no {MANIFEST}: not a complete artifact"):
        remote.download("step-00000006", tmp_path / "back", KIND)
    assert not (tmp_path / "back").exists()


def test_the_manifest_goes_last_on_the_way_up_and_first_on_the_way_out(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteFolder(bucket.uri)
    here = committed(tmp_path / "here", "step-00000003", a="one", z="two")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("the network is down")

    def fail_at_z(path: str, *arguments: Any, **options: Any) -> None:
        (copy if not path.endswith("/z") else fail)(path, *arguments, **options)

    copy = filesystems.copy_files
    with monkeypatch.context() as patched:
        patched.setattr(filesystems, "copy_files", fail_at_z)
        with pytest.raises(ArtifactError, match="step-00000003 cannot be copied there: the network is down"):
            remote.upload(here)
    assert bucket.files() == ["step-00000003/a"]
    remote.upload(here)
    assert remote.complete() == [here.name]

    class Breaks:
        """The file system, up to the point where the files are deleted."""

        delete_dir_contents = fail

        def __getattr__(self, name: str) -> Any:
            return getattr(RemoteFolder(bucket.uri)._fs, name)

    monkeypatch.setattr(remote, "_fs", Breaks())
    with pytest.raises(ArtifactError, match="step-00000003 cannot be deleted: the network is down"):
        remote.remove("step-00000003")
    assert bucket.files() == ["step-00000003/a", "step-00000003/z"]
    assert remote.complete() == []


def test_a_copy_that_was_cut_off_is_replaced_whole(bucket: Bucket, tmp_path: Path) -> None:
    """Files of the first try that the second has not (another number of workers) must not make it a damaged one."""
    remote = RemoteFolder(bucket.uri)
    remote.upload(committed(tmp_path / "here", "step-00000003", rank_0="a", rank_1="b", sub__deep="c"))
    remote.upload(committed(tmp_path / "here", "step-00000003", rank_0="ab"))
    remote.download("step-00000003", tmp_path / "back", KIND)
    assert (tmp_path / "back/rank_0").read_text() == "ab"
    assert bucket.files() == [f"step-00000003/{MANIFEST}", "step-00000003/rank_0"]


def test_only_committed_directories_with_the_prefix_are_named(bucket: Bucket, tmp_path: Path) -> None:
    remote = RemoteFolder(bucket.uri)
    for name in ("step-00000003", "tokens", "zzz"):
        remote.upload(committed(tmp_path / "here", name, a="one"))
    bucket.write("step-00000009/deeper/manifest.json", b"{}")
    bucket.write("step-notes.txt", b"mine")
    assert remote.complete() == ["step-00000003", "tokens", "zzz"]
    assert remote.complete("step-") == ["step-00000003"]


def test_folders_below_one_uri_are_apart(bucket: Bucket, tmp_path: Path) -> None:
    """Stages and runs share an upload's URI, and each has a `step-00000003`."""
    one, other = RemoteFolder(bucket.uri, "sft-1"), RemoteFolder(bucket.uri, "sft-2")
    one.upload(committed(tmp_path / "here", "step-00000003", a="one"))
    assert (one.complete(), other.complete(), RemoteFolder(bucket.uri).complete()) == (["step-00000003"], [], [])
    other.upload(committed(tmp_path / "here", "step-00000003", a="two"))
    one.remove("step-00000003")
    assert bucket.files() == [f"sft-2/step-00000003/{name}" for name in ("a", MANIFEST)]
    assert other.uri.endswith("/sft-2")


def test_removed_is_only_what_was_named(bucket: Bucket, tmp_path: Path) -> None:
    remote = RemoteFolder(bucket.uri)
    for name in ("step-00000003", "step-00000006"):
        remote.upload(committed(tmp_path / "here", name, a="one", sub__b="two"))
    bucket.write("step-notes.txt", b"mine")
    remote.remove("step-00000003")
    remote.remove("step-00000003")  # again: it is what was asked for
    assert [name for name in bucket.files() if "step-00000003" in name] == []
    assert remote.complete() == ["step-00000006"]
    assert "step-notes.txt" in bucket.files()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda bucket: bucket.write("step-00000003/a", b"onE"), "step-00000003/a: sha256 .*, the manifest says"),
        (lambda bucket: bucket.write("step-00000003/a", b"on"), "step-00000003/a: 2 bytes, the manifest says 3"),
        (lambda bucket: bucket.delete("step-00000003/a"), r"step-00000003: files missing: \['a'\]"),
        (lambda bucket: bucket.write("step-00000003/b", b""), r"step-00000003: .*not in the manifest: \['b'\]"),
        (lambda bucket: bucket.write(f"step-00000003/{MANIFEST}", b"{"), f"step-00000003/{MANIFEST}: unreadable"),
    ],
)
def test_a_damaged_remote_file_is_an_error_that_names_it(
    bucket: Bucket, tmp_path: Path, damage: Callable[[Bucket], None], reason: str
) -> None:
    remote = RemoteFolder(bucket.uri)
    remote.upload(committed(tmp_path / "here", "step-00000003", a="one"))
    damage(bucket)
    with pytest.raises(ArtifactError, match=reason) as error:
        remote.download("step-00000003", tmp_path / "back", KIND)
    assert f"{remote.uri}/step-00000003" in str(error.value), "the remote place, not that of the copy"
    assert list(tmp_path.glob("*back*")) == [], "nothing is left of a copy that does not verify"


def test_another_kind_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    remote = RemoteFolder(bucket.uri)
    remote.upload(committed(tmp_path / "here", "step-00000003", a="one"))
    with pytest.raises(ArtifactError, match="is a resume_state, not a model"):
        remote.download("step-00000003", tmp_path / "back", "model")


def test_what_lost_its_manifest_here_is_not_copied(bucket: Bucket, tmp_path: Path) -> None:
    """A checkpoint that is being removed while it waits for its upload."""
    here = committed(tmp_path / "here", "step-00000003", a="one")
    (here / MANIFEST).unlink()
    remote = RemoteFolder(bucket.uri)
    with pytest.raises(ArtifactError, match=f"no {MANIFEST}"):
        remote.upload(here)
    assert remote.complete() == []


def test_a_bucket_that_is_not_there_is_not_taken_for_an_empty_one(endpoint: str) -> None:
    """Else a typing error in the URI would start a stage again from nothing."""
    with pytest.raises(ArtifactError, match="there is no bucket no-such-bucket: create it, or correct the name"):
        RemoteFolder(s3(endpoint, "no-such-bucket/x")).complete()


def test_an_endpoint_that_cannot_be_reached_is_an_error_in_bounded_time(tmp_path: Path) -> None:
    """The AWS client tries for 6 seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        remote = RemoteFolder(s3(f"127.0.0.1:{probe.getsockname()[1]}", "bucket/some/where"))
        started = time.monotonic()
        with pytest.raises(ArtifactError, match=r"where: cannot be listed: .*NETWORK_CONNECTION") as error:
            remote.complete()
        assert time.monotonic() - started < 30
        assert str(error.value).startswith("s3://bucket/some/where: ")
        assert "a-secret" not in str(error.value)


@pytest.mark.parametrize(
    "uri", ["some/where", "htp://host/x", "file://some/where", "s3:/bucket", "s3://k:a-secret@:x/y"]
)
def test_a_wrong_uri_is_an_error_that_shows_one_and_no_keys(uri: str) -> None:
    with pytest.raises(ArtifactError, match="not a folder's URI such as s3://bucket/path or file:///path") as error:
        RemoteFolder(uri)
    assert "a-secret" not in str(error.value)


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("")
    with pytest.raises(ArtifactError, match="remote: cannot be listed"):
        RemoteFolder(f"file://{tmp_path}/remote").complete()
    here = committed(tmp_path / "here", "step-00000003", a="one")
    with pytest.raises(ArtifactError, match="remote: step-00000003 cannot be copied there"):
        RemoteFolder(f"file://{tmp_path}/remote").upload(here)
