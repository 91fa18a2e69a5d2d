"""What a reader of the documentation has or does beside its commands: ``python -m tests.docs.reader WHAT …``."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path


def photos(archives: str, out: str) -> None:
    """A folder of images for each class."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(Path(archives) / "ILSVRC2012_img_train.tar", folder)
        inner = sorted(Path(folder).glob("*.tar"))
        for name, each in zip(("cat", "dog", "cow", "hen", "ape", "owl"), inner, strict=True):
            shutil.unpack_archive(each, Path(out) / name)


def cifar10(out: str) -> None:
    """An archive of CIFAR-10's form."""
    from tests.data_prep.test_cifar10 import binary_files, tar_of

    (Path(out) / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(tar_of(binary_files())))


def my_job(out: str) -> None:
    """The job that a page shows."""
    from tests.docs.test_examples import example

    Path(out).write_text(example("your_own_model.md", "python"))


def put(folder: str, url: str) -> None:
    """A folder into a bucket."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    fs.put(f"{folder}/", path, recursive=True)


def recorded(uri: str, run: str) -> None:
    """Whether MLflow has a finished run of that name."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, f"attributes.run_name = '{run}'")
    print([each.info.status for each in runs])
    assert any(each.info.status == "FINISHED" for each in runs)


def scraped(prometheus: str, metric: str) -> None:
    """Whether a Prometheus server has values of ``metric``."""
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?query={metric}", timeout=5) as stream:
        found = json.load(stream)["data"]["result"]
    print(found)
    assert found


def answers(url: str) -> None:
    """Wait until a server does."""
    until_s = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
            if time.monotonic() > until_s:
                raise
        except OSError:
            if time.monotonic() > until_s:
                raise
        time.sleep(0.3)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
