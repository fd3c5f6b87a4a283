"""The server, as OpenAI's client and httpx see it: answers, errors, load, disconnects, and the end."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import openai
import pytest
from conftest import ROOT, run_script
from servers import CONTEXT, answer_of, serving, wait_until

from gkachat.data.conversations import render_prompt
from gkachat.inference.engine import Batch

pytest_plugins = ["server_fixtures"]

TURN = [{"role": "user", "content": "turn 1 é"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
    wait_until(lambda: server.batcher.count() == 0)  # no row leaks


def prompt_ids(server, run, text):
    tokenizer = server.sessions[run].engine.tokenizer
    return [tokenizer.bos, *tokenizer.encode(text)]


def test_models_are_listed(server, client):
    assert [model.id for model in client.models.list()] == ["softmax", "gka", "gka_conv"]
    assert client.models.retrieve("gka").context == CONTEXT
    assert [httpx.head(server.url + path).status_code for path in ("/", "/v1/models")] == [200, 200]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("run", ["softmax", "gka", "gka_conv"])
def test_completions_are_the_engines(server, client, run, temperature):
    prompts, settings = ["def f(", "漢"], {"temperature": temperature, "max_tokens": 20}
    result = client.completions.create(model=run, prompt=prompts, n=2, seed=7, **settings)
    expected = [
        answer_of(server.sessions[run], prompt_ids(server, run, prompt), seed=7 + i, **settings)
        for prompt in prompts
        for i in range(2)
    ]
    assert [choice.text for choice in result.choices] == [text for text, _ in expected]
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
    assert result.usage.completion_tokens == sum(len(ids) for _, ids in expected)
    assert result.usage.prompt_tokens == sum(len(prompt_ids(server, run, prompt)) for prompt in prompts)


@pytest.mark.parametrize("run", ["softmax", "gka"])  # continues, answers
def test_chat_answers_are_those_of_the_terminal_and_streams_say_the_same(server, client, run):
    settings = {"model": run, "messages": TURN, "seed": 3, "top_p": 0.9, "max_tokens": 30, "n": 2}
    whole = client.chat.completions.create(**settings)
    session = server.sessions[run]
    render = render_prompt(session.engine.tokenizer, TURN) if run == "gka" else prompt_ids(server, run, "turn 1 é")
    expected = [answer_of(session, render, seed=3 + i, top_p=0.9, max_tokens=30) for i in range(2)]
    assert [choice.message.content for choice in whole.choices] == [text for text, _ in expected]
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **settings))
    texts, ends = ["", ""], ["", ""]
    assert [choice.delta.role for choice in chunks[0].choices] == ["assistant"] * 2
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] += choice.finish_reason or ""
    assert texts == [text for text, _ in expected]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1


def test_an_answer_ends_for_a_reason_and_stop_texts_are_cut_off(server, client):
    ask = {"model": "softmax", "prompt": "def f(", "temperature": 1, "seed": 5}
    whole = client.completions.create(max_tokens=12, **ask).choices[0]
    assert whole.finish_reason == "length"
    for stop in (whole.text[6:9], ["never", whole.text[6:9]]):  # a text that spans tokens
        cut = client.completions.create(max_tokens=12, stop=stop, **ask).choices[0]
        assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(whole.text[6:9])], "stop")
    full = client.completions.create(max_tokens=10_000, **ask | {"temperature": 0})
    assert full.choices[0].finish_reason == "length" and full.usage.total_tokens == CONTEXT + 1


def test_logprobs_come_with_the_likeliest_tokens(client):
    ask = {"model": "gka", "temperature": 0, "max_tokens": 6}
    chat = client.chat.completions.create(messages=TURN, logprobs=True, top_logprobs=2, **ask).choices[0]
    for entry in chat.logprobs.content:  # the likeliest is drawn
        assert len(entry.top_logprobs) == 2
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
    data = b"".join(bytes(entry.bytes) for entry in chat.logprobs.content)
    assert data.decode(errors="replace") == chat.message.content
    text = client.completions.create(prompt="def f(", logprobs=2, **ask).choices[0]
    assert [max(top, key=top.get) for top in text.logprobs.top_logprobs] == text.logprobs.tokens
    assert text.logprobs.text_offset[:2] == [0, len(text.logprobs.tokens[0])]
    assert all(logprob < 0 for logprob in text.logprobs.token_logprobs)


def test_a_conversation_that_is_too_long_is_refused_or_loses_its_oldest_turns(server, client):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} " * 5} for i in range(31)]
    with pytest.raises(openai.BadRequestError, match=r"messages: given \d+ tokens, expected at most") as error:
        client.chat.completions.create(model="gka", messages=turns, max_tokens=8)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
    kept = client.chat.completions.create(
        model="gka", messages=turns, max_tokens=8, extra_body={"truncation": "auto", "return_token_ids": True}
    )
    session = server.sessions["gka"]
    n_tokens = len(render_prompt(session.engine.tokenizer, turns))
    assert kept.usage.tokens_left_out == n_tokens - kept.usage.prompt_tokens > 0
    assert kept.prompt_token_ids == session.prompt_tokens(turns, 8) and kept.usage.prompt_tokens <= CONTEXT - 8
    assert kept.usage.cache_bytes == session.engine.model.make_cache(1, CONTEXT, block=256).bytes_of(
        kept.usage.total_tokens
    )


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        (CHAT, b'{"model": "gka", "messages"', "not JSON", None),
        (CHAT, b"[" * 100_000, "", None),
        (CHAT, b"\xff", "", None),
        (CHAT, b"[]", "body: expected a JSON object", None),
        (CHAT, b'{"seed": ' + b"1" * 5000 + b"}", "the body: cannot be read as JSON: Exceeds the limit", None),
        (CHAT, b" " * (2 << 20), "the body: expected at most 1,048,576 bytes", None),
        (CHAT, {"messages": TURN}, "model: given nothing", "model"),
        (CHAT, {"messages": []}, "expected a list of messages", "messages"),
        (CHAT, {"messages": "x"}, "messages: given 'x'", "messages"),
        (CHAT, {"messages": [*TURN, *TURN]}, "given role 'user', expected 'assistant'", "messages"),
        (CHAT, {"messages": [*TURN, {"role": "assistant", "content": ""}]}, "expected 'user'", "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair", "messages"),
        (CHAT, {"messages": [{**TURN[0], "tool_calls": [1]}]}, "'tool_calls' is not supported", "messages"),
        (CHAT, {"messages": TURN, "tools": [{}]}, "tools: given [{}], which is not supported", "tools"),
        (CHAT, {"messages": TURN, "\ud83d": 1}, "not supported", "\ud83d"),
        (CHAT, {"messages": TURN, "presence_penalty": 0.5}, "which is not supported", "presence_penalty"),
        (CHAT, {"messages": TURN, "temperature": "hot"}, "temperature: given 'hot'", "temperature"),
        (CHAT, {"messages": TURN, "temperature": -1}, "temperature: given -1.0, expected 0 or more", "temperature"),
        (CHAT, {"messages": TURN, "top_p": 0}, "top_p: given 0.0, expected above 0", "top_p"),
        (CHAT, {"messages": TURN, "top_k": 10**400}, "top_k: given 1000", "top_k"),
        (CHAT, {"messages": TURN, "max_tokens": -1}, "max_tokens: given -1", "max_tokens"),
        (CHAT, {"messages": TURN, "n": 0}, "n: given 0", "n"),
        (CHAT, {"messages": TURN, "n": 10**9}, "given 1000000000 texts at once, expected at most 132", "n"),
        (CHAT, {"messages": TURN, "stop": ["a"] * 5}, "given 5 texts, expected at most 4", "stop"),
        (CHAT, {"messages": TURN, "stop": ""}, "expected texts that are not empty", "stop"),
        (CHAT, {"messages": TURN, "top_logprobs": 2}, "expected logprobs true", "top_logprobs"),
        (CHAT, {"messages": TURN, "stream_options": {"x": 1}}, "stream_options", "stream_options"),
        (TEXT, {"prompt": "x" * 2000}, "expected at most the model's context of 128", "prompt"),
        (TEXT, {"prompt": [5, "a"]}, "valid string, or: Input should be a valid integer, or: Input", "prompt"),
        (TEXT, {"prompt": [5, 300]}, "given id 300, expected ids from 0 to", "prompt"),
        (TEXT, {"prompt": "x", "echo": True}, "echo: given True", "echo"),
        (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs: given 21", "logprobs"),
        ("/attention", {"tokens": []}, "tokens: given []", "tokens"),
        ("/attention", {"tokens": [5] * 129}, "given 129 tokens", "tokens"),
    ],
)
def test_wrong_requests_get_an_error_object(server, path, body, message, param):
    if isinstance(body, dict):
        body = json.dumps(({} if body == {"messages": TURN} else {"model": "gka"}) | body).encode()
    answer = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and message in error["message"]


def test_unknown_models_paths_and_other_types_of_body_get_an_error_object(server, client):
    with pytest.raises(openai.NotFoundError, match="given 'gpt', expected softmax, gka, gka_conv") as error:
        client.completions.create(model="gpt", prompt="x")
    assert error.value.code == "model_not_found"
    for answer, status in (
        (httpx.get(f"{server.url}/v1/nothing"), 404),
        (httpx.get(server.url + CHAT), 405),
        # A page of another site could send this without the browser asking first.
        (httpx.post(server.url + TEXT, content='{"model": "gka", "prompt": "x"}'), 400),
    ):
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_parameter_that_asks_for_nothing_is_accepted(client):
    neutral = {"presence_penalty": 0, "logit_bias": {}, "user": "me", "seed": None, "stop": None, "top_k": 0}
    ours = {"tool_choice": "none", "parallel_tool_calls": True, "service_tier": "auto", "prompt_cache_key": "k"}
    options = {"include_usage": True, "include_obfuscation": False}
    for extra in (neutral, ours, {"top_k": -1, "stream_options": options}):
        assert client.chat.completions.create(model="gka", messages=TURN, max_tokens=2, extra_body=extra).choices


def test_a_developer_message_is_a_system_message(client):
    ask = {"model": "gka", "max_tokens": 2, "extra_body": {"return_token_ids": True}}
    read = [
        client.chat.completions.create(messages=[{"role": role, "content": "x"}, *TURN], **ask).prompt_token_ids
        for role in ("developer", "system")
    ]
    assert read[0] == read[1]


@pytest.mark.parametrize("key", [None, "secret"])
def test_a_page_of_another_host_cannot_have_its_name_point_here(sessions, key):
    """Such a page could read the answers of a server on this machine. One that asks for a key needs no other guard."""
    headers = {"Authorization": "Bearer secret"}
    with serving({"gka": sessions["gka"]}, api_key=key, only_local=key is None) as server:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:80"):
            assert httpx.get(f"{server.url}/v1/models", headers=headers | {"Host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", ":80"):
            answer = httpx.get(f"{server.url}/v1/models", headers=headers | {"Host": host})
            assert answer.status_code == (403 if key is None else 200), host
            assert key or "expected localhost or an address" in answer.json()["error"]["message"]


def test_64_clients_at_once_each_get_their_own_answer(server):
    """Mixed lengths, streamed and whole, with clients that go away and bodies that are no JSON among them."""
    runs = [*server.sessions]

    def request_of(i):
        ask = {"model": runs[i % 3], "prompt": "def f(" + " 1" * (i % 7), "max_tokens": 1 + 3 * (i % 9), "seed": i}
        return ask | {"temperature": i % 2, "stream": i % 4 < 2}

    async def one(http, i):
        ask = request_of(i)
        if i % 8 == 7:
            return (await http.post(TEXT, content=b'{"model": ')).status_code
        if not ask["stream"]:
            return (await http.post(TEXT, json=ask)).json()["choices"][0]["text"]
        async with http.stream("POST", TEXT, json=ask) as response:
            text = ""
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return text
                text += json.loads(line[6:])["choices"][0]["text"] if line else ""
                if i % 8 == 0:
                    return None  # goes away
        raise AssertionError(f"no end of {i}: {text}")

    async def all_clients():
        limits, headers = httpx.Limits(max_connections=64), {"Content-Type": "application/json"}
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, headers=headers) as http:
            return await asyncio.gather(*(one(http, i) for i in range(64)))

    for i, got in enumerate(asyncio.run(all_clients())):
        ask = request_of(i)
        settings = {name: ask[name] for name in ("max_tokens", "seed", "temperature")}
        ids = prompt_ids(server, ask["model"], ask["prompt"])
        expected = 400 if i % 8 == 7 else answer_of(server.sessions[ask["model"]], ids, **settings)[0]
        assert got == (None if i % 8 == 0 and got is None else expected), i
    wait_until(lambda: server.batcher.count() == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server, slow, stream):
    """Two of its six answers wait for a row. All of them would take seven seconds."""
    ask = {"model": "gka", "prompt": "x", "n": 6, "max_tokens": 120, "stream": stream, "temperature": 0}
    body = json.dumps(ask).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: server.batcher.count() == 6)
    wait_until(lambda: server.batcher.count() == 0, seconds=2)


def test_a_full_queue_and_a_stopping_server_refuse(sessions):
    gate, ask = threading.Event(), {"model": "gka", "prompt": "x", "max_tokens": 3}
    with serving(sessions, rows=1, max_waiting=1, api_key="secret") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=10)
        server.batcher.call(gate.wait)  # nothing runs
        try:
            stream = client.completions.create(stream=True, n=2, **ask)
            with pytest.raises(openai.RateLimitError, match="1 requests are waiting already") as error:
                client.completions.create(**ask)
            assert error.value.response.headers["retry-after"] == "1"
        finally:
            gate.set()
        assert list(stream)
        assert client.completions.create(**ask).choices
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="guess").completions.create(**ask)
        assert httpx.get(server.url).status_code == 200  # the page asks for the key
        server.batcher.drain(0)
        with pytest.raises(openai.InternalServerError, match="the server is stopping") as error:
            client.completions.create(**ask)
        assert error.value.status_code == 503
        client.close()


def test_a_model_that_fails_ends_its_answers_and_serves_the_next(server, client, monkeypatch):
    ask, step = {"model": "gka", "prompt": "x", "max_tokens": 5, "temperature": 0}, Batch.step
    failures = [RuntimeError("out of memory")] * 2

    def failing(batch):
        if failures:
            raise failures.pop()
        return step(batch)

    monkeypatch.setattr(Batch, "step", failing)
    with pytest.raises(openai.InternalServerError, match="the model failed: RuntimeError"):
        client.completions.create(**ask)
    with pytest.raises(openai.APIError, match="the model failed"):  # after the status was sent
        list(client.completions.create(stream=True, **ask))
    assert client.completions.create(**ask).choices[0].text


def test_sigterm_lets_answers_finish_and_ends_the_others_with_an_error(home):
    command = [sys.executable, "-m", "scripts.serve", home / "runs" / "long", "--port=0", "--grace=1", "--device=cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())[0]
        ends, started = {}, threading.Barrier(3)
        assert httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code == 403

        def listen_to(max_tokens):
            ask = {"model": "long", "prompt": "x", "max_tokens": max_tokens, "temperature": 0, "stream": True}
            with httpx.stream("POST", url + TEXT, json=ask, timeout=60) as response:
                lines = response.iter_lines()
                next(lines)
                started.wait()
                ends[max_tokens] = [line for line in lines if line][-1]

        threads = [threading.Thread(target=listen_to, args=[n]) for n in (20, 8000)]
        for thread in threads:
            thread.start()
        started.wait()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert ends[20] == "data: [DONE]"
    assert "the server stopped before the answer was complete" in ends[8000]


def test_the_benchmark_runs_from_end_to_end(home, tmp_path):
    sizes = ["--requests=3", "--tokens=4", "--clients=2", "--rounds=1", "--memory=4", "--threads=1"]
    result = run_script("bench_serve", "softmax", *sizes, "--device=cpu", f"--out={tmp_path / 'serve'}", home=home)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "serve.json").read_text())
    assert written["speed"][0]["name"] == "engine alone" and len(written["speed"]) == 3
    assert all(row["fit"] * row["per_row"] <= 4 << 20 for row in written["caches"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["d9"], "no run 'd9'"),
        (["gka", "gka"], "two runs of the name 'gka'"),
        (["gka", "--port", "70000"], "cannot listen on 127.0.0.1, port 70000"),
        (["gka", "--rows", "0"], "given rows 0"),
        (["gka", "--grace", "nan"], "grace nan"),
        (["gka", "--api-key", ""], "api_key: expected printable ASCII characters"),
        (["gka", "--threads", "0"], "threads: given 0"),
    ],
)
def test_a_server_that_cannot_start_says_why(home, words, message):
    result = run_script("serve", *words, "--device=cpu", home=home)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
