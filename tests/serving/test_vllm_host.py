"""The engine host over vLLM: the same requests, the same answers, through vLLM's own process."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from tests.serving.sites import Plane, Site, hello, process

from flash.client.engines import install_vllm
from flash.inference.chat import ChatRenderer
from flash.inference.engine import Request, Sampling
from flash.inference.torch_engine import TorchEngine

HOME = Path(__file__).parents[2] / ".venv-vllm"  # as in tests/inference/test_vllm_engine.py
ASK = {"model": "m", "messages": [{"role": "user", "content": "What is 12 + 30?"}], "temperature": 0, "max_tokens": 16}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_host_over_vllm_answers_as_the_built_in_engine_does(adapters, base, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.serving.sites.PATIENCE_S", 600)  # vLLM takes half a minute to start
    folder, stored = adapters
    prompt = tuple(ChatRenderer(base.tokenizer).render_prompt(ASK["messages"]))
    sampling = Sampling(max_tokens=ASK["max_tokens"], temperature=0)
    names = [None, "a0", "a1"]
    wanted = TorchEngine(base).generate([Request(prompt, sampling, adapter=name) for name in names])
    texts = [ChatRenderer(base.tokenizer).answer_text(each[0].tokens, base.stop_ids) for each in wanted]
    plane = Plane()
    told = hello(
        folder, plane_url=plane.url, vllm_python=str(install_vllm(HOME, cpu=True).python), work_dir=str(tmp_path)
    )
    try:
        with process(told) as started:
            site = Site(plane.wait_for(lambda beat: beat["state"] == "ready")["url"])
            children = psutil.Process(started.pid).children(recursive=True)
            assert children  # vLLM's
            said = [
                site.http.post("/v1/chat/completions", json=ASK, headers=headers, timeout=300).json()
                for headers in ({}, stored[0].headers, stored[1].headers)
            ]
            assert [each["choices"][0]["message"]["content"] for each in said] == texts
            streamed = site.openai(timeout=300).chat.completions.create(**ASK, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == texts[0]
            site.refused("/v1/chat/completions", {**ASK, "max_tokens": 10**6}, 400)
            started.terminate()  # drains
            assert started.wait(120) == 0
            assert not psutil.wait_procs(children, timeout=30)[1]  # vLLM went with it
        with process(told) as started:
            plane.beats.clear()
            plane.wait_for(lambda beat: beat["state"] == "ready")
            children = psutil.Process(started.pid).children(recursive=True)
            started.kill()
            assert not psutil.wait_procs(children, timeout=30)[1]  # nor does vLLM outlive a host that is killed
    finally:
        plane.close()
