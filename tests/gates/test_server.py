"""What is read of a server before a run, from texts such as vLLM's."""

from __future__ import annotations

import asyncio

import pytest

from gates import client, server
from stack.errors import StackError

# The names, labels and form of vLLM 0.22.1's metrics; the values are made up.
METRICS = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="256",cache_dtype="fp8",enable_prefix_caching="True",engine="0",\
num_gpu_blocks="1234"} 1.0
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 5.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 2.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 1.0
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 85.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 50.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} 3.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 8.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 8.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 2.5
# TYPE http_requests_total counter
http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"} 8.0
http_requests_total{handler="/v1/chat/completions",method="POST",status="5xx"} 1.0
http_requests_total{handler="/v1/completions",method="POST",status="5xx"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} NaN
"""


def within(fake, function):
    async def once():
        async with client.http(fake.url) as http:
            return await function(http)

    return asyncio.run(once())


def test_metrics_are_added_up_over_their_labels(fake):
    fake.metrics_text = METRICS
    values = within(fake, server.read_metrics)
    wanted = {
        "request_success": 8.0,
        "request_success.stop": 5.0,
        "request_success.abort": 1.0,
        "spec_decode_num_drafts": 100.0,
        "spec_decode_num_accepted_tokens_per_pos.1": 50.0,
        "http_5xx": 3.0,
        "http_2xx": 8.0,
        "time_to_first_token_seconds_sum": 2.5,
    }
    assert wanted.items() <= values.items()
    assert not [name for name in values if "bucket" in name or "created" in name]
    assert "kv_cache_usage_perc" not in values


@pytest.mark.parametrize("text", ["", "{{{ no metrics"])
def test_metrics_that_cannot_be_read_are_none_or_empty(fake, text):
    fake.metrics_text = text
    assert not within(fake, server.read_metrics)


def test_a_vllm_says_what_it_is(fake):
    fake.metrics_text, fake.max_model_len = METRICS, 65536
    told = within(fake, lambda http: server.probe(http, fake.url, None))
    assert told.record() == {
        "url": fake.url,
        "model": "fake-model",
        "max_model_len": 65536,
        "version": "0.22.1",
        "has_tokenize": True,
        "has_metrics": True,
        "prefix_cache": True,
        "speculation": True,
        "answered_before": 8,
    }
    assert fake.sent == [], "nothing is generated before the first request is measured"


def test_another_server_says_less_and_nothing_is_made_up(fake):
    fake.version, fake.tokenize_status, fake.max_model_len = None, 404, None
    fake.metrics_text = "process_start_time_seconds 1.0\n"
    told = within(fake, lambda http: server.probe(http, fake.url, None))
    assert (told.version, told.max_model_len, told.prefix_cache) == (None, None, None)
    assert (told.has_tokenize, told.speculation) == (False, False)


def test_no_model_and_a_wrong_model_are_said(fake):
    with pytest.raises(StackError, match="has no model other"):
        within(fake, lambda http: server.probe(http, fake.url, "other"))


def test_health(fake):
    assert within(fake, server.healthy) is True
    fake.healthy = False
    assert within(fake, server.healthy) is False


def test_requests_carry_what_the_server_knows_and_nothing_else(fake):
    from gates.session import Request, body_of

    request = Request([{"role": "user", "content": "x"}], max_tokens=4, ignore_eos=True)
    vllm = server.Server("u", "m", version="0.22.1")
    other = server.Server("u", "m")
    assert body_of(vllm, request)["ignore_eos"] is True
    assert "ignore_eos" not in body_of(other, request)
    assert "chat_template_kwargs" not in body_of(vllm, request)
    assert body_of(vllm, request)["stream_options"] == {
        "include_usage": True,
        "continuous_usage_stats": True,
    }
    assert body_of(other, request)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_an_address_may_end_with_v1(tail):
    assert client.bare(f"http://127.0.0.1:8000{tail}") == "http://127.0.0.1:8000"
    assert client.bare(f"http://host/openai{tail}") == "http://host/openai"


def test_the_key_goes_to_the_server_and_no_proxy_is_asked(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with_key = client.http("http://127.0.0.1:9", "secret")
    assert with_key.headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in client.http("http://127.0.0.1:9").headers
    assert not with_key._mounts
