"""The unchanged tritonclient package against a real router and gang. It is an extra of its own, for it brings 55 MB of others along:
``make test-kserve`` installs it and runs this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.gang import FAKE, Gang, short_folder, wait_for
from tests.support.router_process import RouterRun
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams

client_of = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed (pip install '.[kserve]', or make test-kserve)")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with short_folder() as folder, RouterRun(folder, http=True) as router:
        url = router.wait_serving().http
        with Gang(folder, [router.spec.back], tp=1, engine=FAKE, artifact=router.spec.models[0].tokenizer):
            made = client_of.InferenceServerClient(url.removeprefix("http://"), network_timeout=60.0, connection_timeout=60.0)
            wait_for(made.is_server_ready, what="the gang")
            yield made
            made.close()


def tensors(text: str, tokens: int) -> list[Any]:
    values = {"text_input": np.array([[text]], dtype=object), "max_tokens": np.array([[tokens]], dtype=np.int32)}
    values |= {"temperature": np.array([[0.0]], dtype=np.float32), "ignore_eos": np.array([[True]])}
    made = []
    for name, value in values.items():
        kind = {"text_input": "BYTES", "max_tokens": "INT32", "temperature": "FP32", "ignore_eos": "BOOL"}[name]
        made.append(client_of.InferInput(name, list(value.shape), kind))
        made[-1].set_data_from_numpy(value, binary_data=False)
    return made


def oracle(text: str, tokens: int) -> bytes:
    return bytes(expected_tokens(list(text.encode()), SamplingParams(temperature=0.0, max_tokens=tokens)))


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("m") and client.is_model_ready("m", "1")
    assert client.get_server_metadata()["name"] == "trireme"
    assert client.get_model_metadata("m")["inputs"][0]["name"] == "text_input"
    assert client.get_model_config("m", "1")["backend"] == "trireme"
    with pytest.raises(client_of.InferenceServerException, match="does not exist"):
        client.get_model_metadata("ghost")


@pytest.mark.parametrize("outputs", [None, ["text_output"]], ids=["all outputs", "one by name"])
def test_infer(client: Any, outputs: list[str] | None) -> None:
    wanted = [client_of.InferRequestedOutput(name, binary_data=False) for name in outputs] if outputs else None
    result = client.infer("m", tensors("hello", 7), outputs=wanted, request_id="r1")
    assert result.as_numpy("text_output").reshape(-1)[0].encode() == oracle("hello", 7)
    assert result.get_response()["id"] == "r1"


def test_binary_tensors_are_refused_in_words(client: Any) -> None:
    text = client_of.InferInput("text_input", [1, 1], "BYTES").set_data_from_numpy(np.array([["hello"]], dtype=object), binary_data=True)
    with pytest.raises(client_of.InferenceServerException, match="binary tensors are not taken"):
        client.infer("m", [text])
