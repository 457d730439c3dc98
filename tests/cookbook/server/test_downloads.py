"""Files of a checkpoint are downloaded by signed URLs, as tinker-cookbook does it."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tinker

from cookbook.clients.service import ServiceClient
from cookbook.server.downloads import Signatures
from cookbook.server.options import ServerOptions
from cookbook.server.promises import Refusal
from cookbook.server.serving import serving

KEY = "tml-" + "k" * 20


@pytest.fixture(scope="module")
def address(service: ServiceClient, tiny_qwen3: str, folder: Path) -> Iterator[str]:
    """The address of a server that demands a key, which downloads by URL do not carry."""
    with serving(ServerOptions([tiny_qwen3], folder, port=0, api_key=KEY), service) as address:
        yield address


@pytest.fixture(scope="module")
def urls(address: str, tiny_qwen3: str) -> dict[str, str]:
    """The URLs of the files of a checkpoint, by their names."""
    metadata = {"made_by": "a test"}
    with tinker.ServiceClient(base_url=address, api_key=KEY, user_metadata=metadata) as service:
        training = service.create_lora_training_client(base_model=tiny_qwen3, rank=2)
        path = training.save_weights_external("out", ttl_seconds=3600).result().path
        rest = service.create_rest_client()
        found = rest.get_external_weights_urls(path).result()
        assert found.expires > datetime.now(UTC) + timedelta(minutes=50)
        run = rest.get_training_run_by_tinker_path(path).result()
        assert run.user_metadata == metadata, "of the session, as in process"
    return dict(found.urls)


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_each_file_of_a_checkpoint_is_downloaded_by_its_url(urls: dict[str, str], folder: Path) -> None:
    (saved,) = folder.glob("*/external_weights/out")
    assert "adapter_model.safetensors" in urls
    for name, url in urls.items():
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.read() == (saved / name).read_bytes()


def test_a_changed_url_reads_nothing(urls: dict[str, str], address: str) -> None:
    url = urls["adapter_model.safetensors"]
    bare, _, query = url.partition("?")
    other = bare.replace("adapter_model.safetensors", "adapter_config.json")
    assert status_of(url) == 200
    assert status_of(bare) == 403
    assert status_of(f"{other}?{query}") == 403
    assert status_of(url.replace("signature=", "signature=0")) == 403
    assert status_of(url.replace("expires=", "expires=9")) == 403
    outside = bare.replace("external_weights/out/adapter_model.safetensors", "..%2F..%2Fx/out/state.json")
    assert status_of(f"{outside}?{query}") in (403, 404)


def test_a_signature_is_of_one_file_until_it_expires() -> None:
    signatures, now = Signatures(), datetime.now(UTC)

    def asked(seconds: int, other: Signatures = signatures) -> dict[str, str]:
        query = other.query("run/x/file", now + timedelta(seconds=seconds))
        return dict(one.split("=") for one in query.split("&"))

    signatures.check("run/x/file", **asked(60))
    for file, query in (
        ("run/x/file2", asked(60)),
        ("run/x/file", asked(-1)),
        ("run/x/file", asked(60, Signatures())),
        ("run/x/file", {"expires": "²", "signature": "é"}),
    ):
        with pytest.raises(Refusal, match="not valid"):
            signatures.check(file, **query)
