"""Committed directories on a remote file system: what pyarrow reaches by URI (file://, s3://, gs://, hdfs://).

Object stores have no rename, so a directory is there when its manifest is: the manifest goes last on the way up and
first on the way out.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import ArrowException
from pyarrow import fs as filesystems

from rxt_platform.errors import ArtifactError
from rxt_platform.storage.directory import MANIFEST, commit_copy, read_manifest

_CHUNK = 8 * 2**20
_RETRY_SECONDS = 60  # of Google's client, whose own default is 15 minutes; S3's gives up sooner


class RemoteFolder:
    """A folder of committed directories. All methods raise ArtifactError when the storage does not do as asked."""

    def __init__(self, uri: str, below: str = "") -> None:
        """`below` names a folder in the one that `uri` does."""
        self.uri = re.sub(r"//[^/@?]*@", "//", uri).partition("?")[0]  # as messages name it: without the keys to it
        if re.match(r"gc?s://", uri) and "retry_limit_seconds" not in uri:
            uri = f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={_RETRY_SECONDS}"
        try:
            self._fs, path = filesystems.FileSystem.from_uri(uri)
        except (ArrowException, OSError, ValueError) as error:
            told = str(error).replace(uri, self.uri)
            raise ArtifactError(
                f"{self.uri}: not a folder's URI such as s3://bucket/path or file:///path: {told}"
            ) from None
        self._path = f"{path.rstrip('/')}/{below}".rstrip("/")
        self.uri = f"{self.uri.rstrip('/')}/{below}".rstrip("/")

    def complete(self, prefix: str = "") -> list[str]:
        """Names of the directories that have a manifest and begin with `prefix`, sorted."""
        with self._explained("cannot be listed"):
            found = self._fs.get_file_info(filesystems.FileSelector(self._path, allow_not_found=True))
            if not found and self._fs.type_name != "local":
                self._check_bucket()
            names = [info.base_name for info in found if info.base_name.startswith(prefix)]
            manifests = self._fs.get_file_info([f"{self._path}/{name}/{MANIFEST}" for name in names])
        return sorted(name for name, manifest in zip(names, manifests, strict=True) if manifest.is_file)

    def upload(self, directory: Path) -> None:
        """Copy a committed directory here under its own name, replacing what is there."""
        read_manifest(directory)
        target = f"{self._path}/{directory.name}"
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        with self._explained(f"{directory.name} cannot be copied there"):
            self._delete(target)
            for path in sorted(paths, key=lambda path: path.name == MANIFEST):
                there = f"{target}/{path.relative_to(directory).as_posix()}"
                self._fs.create_dir(there.rpartition("/")[0], recursive=True)
                filesystems.copy_files(
                    str(path), there, filesystems.LocalFileSystem(), self._fs, chunk_size=_CHUNK, use_threads=False
                )

    def download(self, name: str, target: Path, kind: str) -> None:
        """Fetch the directory `name` and verify it."""
        source, folder = f"{self._path}/{name}", target
        try:
            with commit_copy(target, kind) as folder, self._explained(f"{name} cannot be fetched"):
                for info in self._fs.get_file_info(filesystems.FileSelector(source, recursive=True)):
                    if info.is_file:
                        path = folder / Path(info.path).relative_to(source)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        filesystems.copy_files(
                            info.path, str(path), self._fs, filesystems.LocalFileSystem(), chunk_size=_CHUNK
                        )
        except ArtifactError as error:  # the copy is gone again: what is wrong is there
            raise ArtifactError(str(error).replace(str(folder), f"{self.uri}/{name}")) from error

    def remove(self, name: str) -> None:
        """Delete a directory."""
        with self._explained(f"{name} cannot be deleted"):
            self._delete(f"{self._path}/{name}")

    def _delete(self, target: str) -> None:
        if self._fs.get_file_info(f"{target}/{MANIFEST}").is_file:
            self._fs.delete_file(f"{target}/{MANIFEST}")
        self._fs.delete_dir_contents(target, missing_dir_ok=True)
        if self._fs.get_file_info(target).type == filesystems.FileType.Directory:
            self._fs.delete_dir(target)

    def _check_bucket(self) -> None:
        """An object store says of a bucket that is not there that it is empty."""
        bucket = self._path.partition("/")[0]
        if self._fs.get_file_info(bucket).type == filesystems.FileType.NotFound:
            raise ArtifactError(f"{self.uri}: there is no bucket {bucket}: create it, or correct the name")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ArrowException, OSError) as error:
            raise ArtifactError(f"{self.uri}: {what}: {error}") from error
