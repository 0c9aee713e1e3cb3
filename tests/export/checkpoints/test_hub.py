"""Checkpoints of the hub, through huggingface_hub and a server on this machine; and names that are not the hub's."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dit_export.checkpoints.autoencoders import autoencoder_for
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.request import ExportRequest
from huggingface_hub import constants, snapshot_download
from safetensors.torch import load_file, save_file
from support.hub_cache import snapshot_from_folder
from support.hub_server import COMMIT, HubServer, running_hub

from dit_runtime.core.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD = "f" * 40
HUB_ID = "owner/dit"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a working directory without folders."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


@pytest.fixture
def repository(checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny pipeline, with a sharded variant of its transformer, as a repository's folder."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "repository"))
    transformer = folder / "transformer"
    tensors = load_file(transformer / WEIGHTS)
    shards = {
        name: f"diffusion_pytorch_model.fp16-0000{index % 2 + 1}-of-00002.safetensors"
        for index, name in enumerate(tensors)
    }
    for shard in set(shards.values()):
        save_file({name: tensors[name].half() for name in tensors if shards[name] == shard}, transformer / shard)
    index = {"metadata": {}, "weight_map": shards}
    (transformer / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that can be reached; its cache is empty."""
    with running_hub({HUB_ID: repository}) as hub:
        hub.revisions["v1"] = OLD
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub


def refusal(name: str, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Source(name, **options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_repository_is_downloaded_once(hub: HubServer, capfd: pytest.CaptureFixture[str]) -> None:
    """Name and commit are the repository's; the second time the hub is not asked; nothing is written to a pipe."""
    first = load_checkpoint(Source(HUB_ID))
    count = len(hub.downloads)
    hub.refusals[HUB_ID] = (503, "")
    second = load_checkpoint(Source(HUB_ID))
    assert len(hub.downloads) == count
    for found in (first, second):
        assert (found.name, found.revision) == (HUB_ID, COMMIT)
    assert capfd.readouterr().err == ""


def test_a_revision(hub: HubServer) -> None:
    """``@`` names a tag, a branch with a slash or a commit; another is refused by its name."""
    assert load_checkpoint(Source(f"{HUB_ID}@v1")).revision == OLD
    assert load_checkpoint(Source(f"{HUB_ID}@{OLD}")).revision == OLD
    hub.revisions["refs%2Fpr%2F1"] = OLD
    assert load_checkpoint(Source(f"{HUB_ID}@refs/pr/1")).revision == OLD
    assert "the hub's repository has no revision 'v2'" in refusal(f"{HUB_ID}@v2")


def test_a_sharded_variant(hub: HubServer, repository: Path) -> None:
    """The shards of a variant are found in the cache; its weights are the rounded ones."""
    plain, variant = load_checkpoint(Source(HUB_ID)), load_checkpoint(Source(HUB_ID, variant="fp16"))
    for name, tensor in plain.weights.items():
        assert torch.equal(variant.weights[name], tensor.half().float())


def test_an_autoencoder_of_the_hub(hub: HubServer, repository: Path) -> None:
    """``--vae`` takes a repository with an autoencoder, and one with a pipeline."""
    for folder in (repository, repository / "vae"):
        hub.repositories = {"owner/vae": folder}
        found = autoencoder_for(Source("none", autoencoder=f"owner/vae@{'main' if folder == repository else 'v1'}"))
        expected = load_file(repository / "vae" / WEIGHTS)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ((401, "RepoNotFound"), "no such repository, or it is private; check the name, or log in with hf auth login"),
        ((404, "RepoNotFound"), "no such repository, or it is private"),
        ((403, "GatedRepo"), "the hub asks to accept this repository's terms"),
        ((401, ""), "the hub refuses access; log in"),
        ((403, ""), "the hub refuses access; log in"),
        ((503, ""), "the hub answers with status 503"),
    ],
)
def test_a_refusal_of_the_hub(hub: HubServer, refused: tuple[int, str], message: str) -> None:
    """Private, gone, gated, forbidden and down: each says what to do, as a checkpoint and as an autoencoder."""
    hub.refusals[HUB_ID] = refused
    assert message in refusal(HUB_ID)
    assert message in refusal("DiT-S/8-256", random_seed=0, autoencoder=HUB_ID)


def test_a_file_that_the_repository_does_not_have(hub: HubServer, repository: Path) -> None:
    """Weights, a configuration or all of it missing: named, with the repository or the file."""
    (repository / "vae" / WEIGHTS).unlink()
    assert "no weights" in refusal(HUB_ID)
    (repository / "model_index.json").unlink()
    assert "model_index.json: missing" in refusal(f"{HUB_ID}@v1")
    (repository / "file.pt").touch()
    hub.repositories = {"owner/file": repository / "transformer" / "none"}
    assert "the hub's repository has no diffusers files (model_index.json" in refusal("owner/file")


def test_a_download_that_breaks_off(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; the next try downloads what is missing, although configurations and the other weights are there."""
    monkeypatch.setattr(
        "huggingface_hub.file_download.time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    )
    hub.cuts[f"transformer/{WEIGHTS}"] = 1000
    assert "the download from the hub failed (" in refusal(HUB_ID)
    hub.cuts.clear()
    hub.downloads.clear()
    assert load_checkpoint(Source(HUB_ID)).name == HUB_ID
    assert [name for name, _ in hub.downloads] == [f"transformer/{WEIGHTS}"]


def test_a_cache_that_lacks_weights_is_not_complete(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old versions of huggingface_hub take any folder of the cache for whole: ours looks for the weights in it."""
    load_checkpoint(Source(HUB_ID))
    snapshot = cache / "models--owner--dit" / "snapshots" / COMMIT

    def old_download(*args: object, local_files_only: bool = False, **options: object) -> str:
        return str(snapshot) if local_files_only else snapshot_download(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("huggingface_hub.snapshot_download", old_download)
    for part in ("transformer", "vae"):
        (snapshot / part / WEIGHTS).unlink()
        assert load_checkpoint(Source(HUB_ID)).name == HUB_ID


def test_a_hub_that_cannot_be_reached(cache: Path, checkpoint: Path) -> None:
    """Offline, what is cached is used; what is not, or in part, says so."""
    assert "not in the hub's cache, and the hub cannot be reached" in refusal(HUB_ID)
    snapshot_from_folder(checkpoint, cache, HUB_ID)
    found = load_checkpoint(Source(HUB_ID))
    assert (found.name, found.revision) == (HUB_ID, COMMIT)


def test_a_snapshot_given_as_a_folder(cache: Path, checkpoint: Path) -> None:
    """A folder of the hub's cache opens; names come from the repository and from links, never from a blob."""
    snapshot = snapshot_from_folder(checkpoint, cache, HUB_ID)
    found = load_checkpoint(Source(str(snapshot)))
    assert (found.name, found.revision) == (HUB_ID, COMMIT)
    file = snapshot / "transformer" / WEIGHTS
    assert file.is_symlink()
    assert ExportRequest(str(file)).bundle_path.name == "diffusion_pytorch_model-fp32.bundle"


def test_a_link_has_its_own_name(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a folder is known by the link's name; ``.`` by the folder's."""
    (tmp_path / "mine").symlink_to(checkpoint)
    assert load_checkpoint(Source(str(tmp_path / "mine"))).name == "mine"
    assert ExportRequest(str(tmp_path / "mine")).bundle_path.name == "mine-fp32.bundle"
    monkeypatch.chdir(checkpoint)
    assert load_checkpoint(Source(".")).name == "tiny"
    assert ExportRequest("./").bundle_path.name == "tiny-fp32.bundle"


def test_a_mistyped_path_is_never_asked_of_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What can only be a path, ends as weights do or lies in a folder that is there: refused, with what is near."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    Path("runs/dit-xl").mkdir(parents=True)
    Path("runs/vae.safetensors").touch()
    Path("gone").symlink_to("nowhere")
    for name, message in (
        ("runs/dit-xk", "no such file or folder; runs has dit-xl;"),
        ("runs/vae", "no such file or folder; runs has vae.safetensors;"),
        ("runs/RUN/dit-xl", "no such file or folder; expected"),
        ("run/dit-xl/transformer", "no such file or folder; . has runs;"),
        ("rums", "no such file or folder; . has runs;"),
        ("owner/vae.safetensors", "no such file or folder; expected"),
        ("./owner/dit", "no such file or folder; expected"),
        ("/nowhere/dit", "no such file or folder; expected"),
        ("owner\\dit", "no such file or folder; expected"),
        ("gone", "is a link to nowhere, which is not there; expected"),
        ("/dev/null", "neither a file nor a folder; expected"),
        ("a" * 300, "cannot be opened (File name too long); expected"),
        ("", "no name; expected"),  # a shell's variable that is empty is not the default
    ):
        assert message in refusal(name), name
        with pytest.raises(CheckpointError) as caught:
            autoencoder_for(Source("none", autoencoder=name))
        assert str(caught.value).startswith(f"autoencoder {name or repr(name)}: {message}")
        assert ExportRequest(name).bundle_path.suffix == ".bundle"
    assert "runs/dit-xk@main is the hub's repository" in refusal("runs/dit-xk")
    assert "the hub was asked" in refusal("runs/dit-xk@main")
