"""Addresses to listen on, and addresses of others: what is out of range is one line before anything is loaded."""

import pytest

from fastft.cli import main
from fastft.errors import UserError
from fastft.serve import address
from fastft.serve.announce import GatewayAddress
from fastft.serve.worker import llama_cpp
from fastft.serve.worker import service as worker


@pytest.mark.parametrize("port", [-5, -1, 65536, 70000, 1 << 40])
@pytest.mark.parametrize("program", ["serve", "worker", "llama_cpp", "bound"])
def test_a_port_out_of_range_is_one_line(model, tmp_path, capsys, program, port):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    port = f"--port={port}"
    if program == "serve":
        assert main(["serve", "--model", str(model), port]) == 1
        assert f"error: {port.replace('=', ' ')}: must be " in capsys.readouterr().err
        return
    start = {
        "worker": lambda: worker.main(["--model", str(model), port]),
        "llama_cpp": lambda: llama_cpp.main(["--model", str(tmp_path / "m.gguf"), port]),
        "bound": lambda: address.bound("127.0.0.1", int(port.partition("=")[2])),
    }
    with pytest.raises(UserError, match=f"^{port.replace('=', ' ')}: must be "):
        start[program]()


@pytest.mark.parametrize("url", ["http://h:70000/v1", "http://h:x/v1", "http://[h/v1", "http:///v1", "h:1"])
def test_an_address_to_which_nothing_can_be_sent_is_one_line(model, tmp_path, capsys, url):
    with pytest.raises(UserError, match=r"--announce .* must be the gateway's address"):
        GatewayAddress(url, "key", None)
    config = tmp_path / "serve.yaml"
    for text, says in (
        (f"workers: [{{url: '{url}#m'}}]", "must be URL#MODEL"),
        (f"model: ['{model}']\nmoderation: {{url: '{url}'}}", "must be an http(s) address"),
    ):
        config.write_text(text)
        assert main(["serve", "--config", str(config)]) == 1
        said = capsys.readouterr().err
        assert says in said and "Traceback" not in said, said
