#!/usr/bin/env python3
"""Runs `latente serve` and talks to it with Python's standard library alone.
Usage: serve_test.py LATENTE REFERENCE_MODELS [unittest's arguments]"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import unittest

import commands_test as commands

PATIENCE = commands.PATIENCE
ENDLESS = {str(commands.END): -100}  # bans what ends a text
TEMPLATES = pathlib.Path(__file__).resolve().parent.parent / "templates"
WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
                   "additionalProperties": False}}}


class Server:
    """A running `latente serve`; as a context it ends with SIGTERM and must have drained well."""

    def __init__(self, *arguments, model="chat", environment=None, log=None):
        if "--ctx-size" not in arguments:
            arguments = ("--ctx-size", 4096, *arguments)
        self.log = log or commands.HOME / f"access-{time.monotonic_ns()}.jsonl"
        self.process = subprocess.Popen(
            [commands.LATENTE, "serve", model, "--port", "0", "--access-log", self.log,
             *map(str, arguments)], cwd=commands.HOME, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {})})
        line = self.process.stderr.readline()
        found = re.search(r"listening on (https?)://([^ ]*):(\d+);", line)
        if not found:
            raise AssertionError(line + self.process.communicate(timeout=PATIENCE)[1])
        self.port = int(found.group(3))
        self.greeting = self.process.stderr.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=PATIENCE)
        finally:
            self.process.kill()

    def connect(self, timeout=PATIENCE):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method, path, body=None, headers=None):
        """Status, headers and the body, parsed if it is JSON."""
        connection = self.connect()
        try:
            raw = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            text = response.read()
            is_json = response.getheader("Content-Type", "").startswith("application/json")
            return response.status, response.headers, json.loads(text) if is_json and text else text.decode()
        finally:
            connection.close()

    def get(self, path):
        status, _, body = self.ask("GET", path)
        if status != 200:
            raise AssertionError(f"{path}: {status} {body}")
        return body

    def post(self, path, **body):
        status, _, answer = self.ask("POST", path, body)
        if status != 200:
            raise AssertionError(f"{path}: {status} {answer}")
        return answer

    def stream(self, path, **body):
        """The events of a stream, which must end with [DONE]."""
        status, headers, text = self.ask("POST", path, {**body, "stream": True})
        if status != 200 or headers["Content-Type"] != "text/event-stream":
            raise AssertionError(f"{path}: {status} {headers} {text}")
        events = text.split("\n\n")
        if events[-2:] != ["data: [DONE]", ""] or not all(event.startswith("data: ") for event in events[:-1]):
            raise AssertionError(text)
        return [json.loads(event[len("data: "):]) for event in events[:-2]]

    def complete(self, prompt, **more):
        return self.post("/v1/completions", **{"prompt": prompt, "temperature": 0, **more})

    def chat(self, text, **more):
        return self.post("/v1/chat/completions",
                         **{"messages": [{"role": "user", "content": text}], "temperature": 0, **more})

    def running(self):
        return sum(slot["is_processing"] for slot in self.get("/slots"))

    def records(self):
        return commands.read_lines(self.log)

    def metric(self, name):
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics"), re.M)
        return float(found.group(1))


def make_model(name, template):
    shutil.copytree(commands.HOME / "model", commands.HOME / name)
    if template:
        shutil.copy(TEMPLATES / template, commands.HOME / name / "chat_template.jinja")


def setUpModule():
    commands.setUpModule()
    make_model("chat", "deepseek_v3.jinja")
    make_model("thinking", "deepseek_r1_style.jinja")


def tearDownModule():
    commands.tearDownModule()


class WithServer(unittest.TestCase):
    ARGUMENTS = []
    MODEL = "chat"

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.ARGUMENTS, model=cls.MODEL)
        cls.addClassCleanup(cls.server.__exit__)

    def assertError(self, answer, status, *words):
        found, _, body = answer
        self.assertEqual(found, status, body)
        self.assertEqual(set(body), {"error"})
        self.assertEqual(set(body["error"]), {"message", "type", "param", "code"})
        for word in words:
            self.assertIn(word, body["error"]["message"])
        return body["error"]


class Protocol(WithServer):
    def test_says_what_it_is(self):
        self.assertEqual(self.server.get("/health"), {"status": "ok"})
        self.assertEqual(self.server.get("/v1/health"), {"status": "ok"})
        models = self.server.get("/v1/models")
        self.assertEqual(models["object"], "list")
        self.assertEqual(models["data"][0]["id"], "chat")
        self.assertEqual(self.server.get("/v1/models/chat"), models["data"][0])
        self.assertEqual(self.server.ask("GET", "/v1/models/other")[0], 404)
        props = self.server.get("/props")
        self.assertEqual(props["total_slots"], 16)
        self.assertIn("add_generation_prompt", props["chat_template"])
        self.assertEqual(len(self.server.get("/slots")), 16)

    def test_page(self):
        status, headers, text = self.server.ask("GET", "/")
        self.assertEqual((status, headers["Content-Type"]), (200, "text/html; charset=utf-8"))
        self.assertIn("default-src 'none'", headers["Content-Security-Policy"])
        self.assertTrue(text.startswith("<!doctype html>") and text.rstrip().endswith("</html>"))
        # It loads nothing from elsewhere.
        self.assertEqual(re.findall(r"""(?:src|href)=["']?(?!data:)[^"'>\s]+""", text), [])

    def test_experts(self):
        def tokens():
            return [sum(layer["tokens"]) for layer in self.server.get("/experts")["layers"]]
        self.server.complete("the king said unto the queen", max_tokens=9, logit_bias=ENDLESS)
        commands.wait_for(lambda: sum(tokens()) > 0, "experts are counted")
        first = tokens()
        self.server.complete("bread and wine", max_tokens=9, logit_bias=ENDLESS)
        commands.wait_for(lambda: sum(first) < sum(tokens()), "more of them")
        text = self.server.get("/metrics")
        self.assertEqual(len(re.findall(r"^latente_expert_imbalance\{", text, re.M)), len(first))
        self.assertNotIn("latente_expert_tokens_total", text)
        props = self.server.get("/props")
        self.assertLess(0, props["cache_bytes_per_token"])
        self.assertLess(props["cache_bytes_per_token"], props["cache_bytes_per_token_mha"])

    def test_tokens_and_text(self):
        answer = self.server.post("/tokenize", content="the king said", with_pieces=True)
        self.assertEqual("".join(token["piece"] for token in answer["tokens"]), "the king said")
        ids = [token["id"] for token in answer["tokens"]]
        self.assertEqual(answer["count"], len(ids))
        pieces = [token["piece"] for token in self.server.post("/tokenize", content="\U0001F600", with_pieces=True)["tokens"]]
        self.assertGreater(len(pieces), 1)  # parts of a character are no text
        self.assertEqual(bytes(byte for piece in pieces for byte in piece).decode(), "\U0001F600")
        self.assertEqual(self.server.post("/detokenize", tokens=ids)["content"], "the king said")
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hé"}]
        prompt = self.server.post("/apply-template", messages=messages)["prompt"]
        self.assertTrue(prompt.endswith("S<｜User｜>hé<｜Assistant｜>"), prompt)
        both = [self.server.post("/tokenize", messages=messages)["tokens"],
                self.server.post("/tokenize", content=prompt)["tokens"]]
        self.assertEqual(*both)

    def test_a_chat(self):
        answer = self.server.chat("hi", max_tokens=12, logit_bias=ENDLESS)
        self.assertEqual(answer["object"], "chat.completion")
        self.assertEqual(answer["model"], "chat")
        choice, = answer["choices"]
        self.assertEqual(choice["message"]["role"], "assistant")
        self.assertTrue(choice["message"]["content"])
        self.assertEqual(choice["finish_reason"], "length")
        self.assertEqual(answer["usage"]["completion_tokens"], 12)
        self.assertEqual(answer["usage"]["total_tokens"], answer["usage"]["prompt_tokens"] + 12)
        self.assertEqual(answer["timings"]["predicted_n"], 12)
        self.assertEqual(self.server.chat("hi", max_completion_tokens=12, logit_bias=ENDLESS)["choices"], answer["choices"])
        parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
        self.assertEqual(self.server.post("/apply-template", messages=[{"role": "user", "content": parts}])["prompt"],
                         self.server.post("/apply-template", messages=[{"role": "user", "content": "h\ni"}])["prompt"])

    def test_a_completion_is_what_generate_writes(self):
        answer = self.server.complete("the king", max_tokens=20)
        written = commands.latente("generate", "chat", "-p", "the king", "-n", 20, "--temperature", 0, "--no-echo").stdout
        self.assertEqual(answer["choices"][0]["text"] + "\n", written)
        self.assertEqual(answer["object"], "text_completion")
        self.assertEqual(self.server.complete("the king", max_tokens=20, echo=True)["choices"][0]["text"],
                         "the king" + answer["choices"][0]["text"])
        ids = self.server.post("/tokenize", content="the king")["tokens"]
        bos = self.server.post("/tokenize", prompt="the king")["tokens"]
        several = self.server.complete(["the king", "a queen"], max_tokens=20)["choices"]
        self.assertEqual([choice["index"] for choice in several], [0, 1])
        self.assertEqual(several[0]["text"], answer["choices"][0]["text"])
        self.assertEqual(self.server.complete(bos, max_tokens=20)["choices"], answer["choices"])
        self.assertEqual(len(self.server.complete([ids, ids], max_tokens=2)["choices"]), 2)

    def test_cached_tokens(self):
        prompt = "night and day " * 30
        first = self.server.complete(prompt, max_tokens=1)["usage"]
        again = self.server.complete(prompt, max_tokens=1)["usage"]
        self.assertEqual(first["prompt_tokens_details"]["cached_tokens"], 0)
        self.assertGreater(again["prompt_tokens_details"]["cached_tokens"], 0.9 * again["prompt_tokens"])

    def test_choices_read_the_prompt_once(self):
        prompt = "bread and water " * 40
        answer = self.server.complete(prompt, max_tokens=2, n=4, temperature=1, seed=1)
        tokens = answer["usage"]["prompt_tokens"]
        self.assertEqual(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0)
        timings = answer["timings"]
        self.assertEqual(timings["prompt_n"] + timings["cache_n"], 4 * tokens)
        self.assertGreater(timings["cache_n"], 3 * (tokens - 64 - 2))  # whole pages, less what modules read ahead

    def test_choices_and_seeds(self):
        how = dict(max_tokens=24, temperature=1, n=3, seed=7)
        first, again = (self.server.complete("the", **how)["choices"] for _ in range(2))
        self.assertEqual(first, again)
        self.assertEqual(len({choice["text"] for choice in first}), 3)
        usage = self.server.complete("the", **how)["usage"]
        self.assertEqual(usage["prompt_tokens"], self.server.complete("the", max_tokens=1)["usage"]["prompt_tokens"])
        self.assertNotEqual(first, self.server.complete("the", **{**how, "seed": 8})["choices"])
        free = {self.server.complete("the", max_tokens=24, temperature=1)["choices"][0]["text"] for _ in range(4)}
        self.assertGreater(len(free), 1)

    def test_sampling_settings_reach_the_sampler(self):
        plain = self.server.complete("the", max_tokens=24, logit_bias=ENDLESS)["choices"][0]["text"]
        for how in (dict(temperature=1, top_k=1), dict(temperature=1, top_p=0.0), dict(temperature=1, min_p=1.0)):
            self.assertEqual(self.server.complete("the", max_tokens=24, logit_bias=ENDLESS, **how)["choices"][0]["text"], plain)
        x = self.server.post("/tokenize", content="x")["tokens"][0]
        self.assertEqual(self.server.complete("the", max_tokens=6, logit_bias={str(x): 100})["choices"][0]["text"], "xxxxxx")
        for penalty in ("presence_penalty", "frequency_penalty"):
            text = self.server.complete("the", max_tokens=40, logit_bias={str(x): 4}, **{penalty: 2})["choices"][0]["text"]
            self.assertNotEqual(text, self.server.complete("the", max_tokens=40, logit_bias={str(x): 4})["choices"][0]["text"])
        penalised = [self.server.complete("the", max_tokens=24, logit_bias=ENDLESS, **{name: 50})["choices"][0]["text"]
                     for name in ("repetition_penalty", "repeat_penalty")]
        self.assertEqual(*penalised)
        self.assertNotEqual(penalised[0], plain)

    def test_unknown_fields_and_null_are_harmless(self):
        plain = self.server.chat("hi", max_tokens=4)["choices"]
        self.assertEqual(self.server.chat("hi", max_tokens=4, user="me", store=False, metadata={"a": 1}, stop=None,
                                          top_p=None, tools=None, seed=None, n=None, logprobs=False,
                                          top_logprobs=0)["choices"], plain)

    def test_forms(self):
        schema = {"type": "object", "properties": {"name": {"enum": ["king", "queen"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
                  "required": ["name", "age"], "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
        for seed in range(3):
            answer = self.server.chat("who?", response_format=form, temperature=1, seed=seed, max_tokens=200)
            value = json.loads(answer["choices"][0]["message"]["content"])
            self.assertEqual(set(value), {"name", "age"})
            self.assertIn(value["name"], schema["properties"]["name"]["enum"])
            self.assertEqual(answer["choices"][0]["finish_reason"], "stop")
        text = self.server.chat("who?", response_format={"type": "json_object"}, max_tokens=30)["choices"][0]["message"]["content"]
        self.assertTrue(text.startswith("{"), text)
        self.assertEqual(self.server.chat("hi", max_tokens=5, response_format={"type": "text"})["choices"],
                         self.server.chat("hi", max_tokens=5)["choices"])

    def test_a_form_that_costs_too_much(self):
        pattern = "^(" + "|".join(f"[a-z ]{{{1 + i % 7},{20 + i}}}x?" for i in range(2000)) + ")*$"
        answer = self.server.ask("POST", "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string", "pattern": pattern}}}})
        self.assertError(answer, 400, "too ambiguous")

    def test_tools(self):
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            answer = self.server.chat("weather?", tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=300)
            message = answer["choices"][0]["message"]
            call, = message["tool_calls"]
            self.assertEqual(call["type"], "function")
            self.assertEqual(call["function"]["name"], "weather")
            self.assertIn(json.loads(call["function"]["arguments"])["city"], ("Paris", "Rome"))
            self.assertIsNone(message["content"])
            self.assertRegex(call["id"], "^[0-9a-f]{9}$")  # Mistral's templates take no others back
            self.assertEqual(answer["choices"][0]["finish_reason"], "tool_calls")
        events = self.server.stream("/v1/chat/completions", messages=[{"role": "user", "content": "weather?"}],
                                    tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
                                    temperature=0, max_tokens=300)
        pieces = [piece for event in events for choice in event["choices"] for piece in choice["delta"].get("tool_calls", [])]
        self.assertEqual({piece["index"] for piece in pieces}, {0})
        self.assertEqual([piece["function"].get("name") for piece in pieces], ["weather"] + [None] * (len(pieces) - 1))
        self.assertEqual("".join(piece["function"]["arguments"] for piece in pieces), call["function"]["arguments"])
        self.assertGreater(len(pieces), 3)  # as they are written
        # The answer goes back in the template's own form.
        prompt = self.server.post("/apply-template", tools=[WEATHER], messages=[
            {"role": "user", "content": "weather?"}, message | {"tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}])["prompt"]
        self.assertIn("<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n" + call["function"]["arguments"], prompt)
        self.assertIn("<｜tool▁output▁begin｜>sunny", prompt)
        self.assertIn("The weather of a city", prompt)
        without = self.server.post("/apply-template", tools=[WEATHER], tool_choice="none",
                                   messages=[{"role": "user", "content": "x"}])["prompt"]
        self.assertNotIn("The weather of a city", without)
        self.assertNotIn("tool_calls", self.server.chat("hi", tools=[WEATHER], max_tokens=8)["choices"][0]["message"])


class LogProbabilities(WithServer):
    def test_of_chats(self):
        self.server.chat("hi", max_tokens=1)  # from the cache, figures may differ in rounding
        answer = self.server.chat("hi", max_tokens=6, logprobs=True, top_logprobs=3, logit_bias=ENDLESS)
        content = answer["choices"][0]["logprobs"]["content"]
        self.assertEqual(len(content), 6)
        for entry in content:
            self.assertLess(entry["logprob"], 0)
            self.assertEqual(len(entry["top_logprobs"]), 3)
            tops = [top["logprob"] for top in entry["top_logprobs"]]
            self.assertEqual(tops, sorted(tops, reverse=True))
            self.assertGreaterEqual(tops[0], entry["logprob"])
        text = b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace")
        self.assertEqual(text, answer["choices"][0]["message"]["content"])
        events = self.server.stream("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], temperature=0,
                                    max_tokens=6, logprobs=True, top_logprobs=3, logit_bias=ENDLESS)
        streamed = [entry for event in events for choice in event["choices"] if choice["logprobs"]
                    for entry in choice["logprobs"]["content"]]
        self.assertEqual(streamed, content)
        self.assertIsNone(self.server.chat("hi", max_tokens=1)["choices"][0]["logprobs"])

    def test_of_completions_with_echo(self):
        whole = self.server.complete("the king said unto the queen", max_tokens=5, logprobs=2, echo=True)
        scores = whole["choices"][0]["logprobs"]
        count = whole["usage"]["total_tokens"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            self.assertEqual(len(scores[key]), count)
        self.assertIsNone(scores["token_logprobs"][0])
        self.assertIsNone(scores["top_logprobs"][0])
        text = whole["choices"][0]["text"]
        for begin, end, token in zip(scores["text_offset"], scores["text_offset"][1:], scores["tokens"]):
            if "�" not in text[begin:end] + token and "<|" not in token:
                self.assertEqual(text[begin:end], token)
        # The same tokens, all as a prompt: the same figures, but for the form of attention.
        ids = self.server.post("/tokenize", prompt="the king said unto the queen")["tokens"]
        again = self.server.complete(ids, max_tokens=0, logprobs=2, echo=True)["choices"][0]["logprobs"]
        self.assertEqual(again["tokens"], scores["tokens"][:len(ids)])
        for a, b in zip(again["token_logprobs"][1:], scores["token_logprobs"][1:]):
            self.assertAlmostEqual(a, b, places=4)
        streamed = self.server.stream("/v1/completions", prompt="the king said unto the queen", temperature=0, max_tokens=5,
                                      logprobs=2, echo=True)
        self.assertEqual("".join(event["choices"][0]["text"] for event in streamed), text)
        tokens = [t for event in streamed if event["choices"][0]["logprobs"] for t in event["choices"][0]["logprobs"]["tokens"]]
        self.assertEqual(tokens, scores["tokens"])

    def test_a_prompt_of_many_pieces(self):
        prompt = "night and day " * 60
        scores = self.server.complete(prompt, max_tokens=0, logprobs=0, echo=True)["choices"][0]["logprobs"]
        self.assertEqual(len(scores["tokens"]), self.server.complete(prompt, max_tokens=1)["usage"]["prompt_tokens"])
        self.assertTrue(all(score < 0 for score in scores["token_logprobs"][1:]))


class Streams(WithServer):
    def test_pieces_make_the_whole(self):
        for seed in range(4):
            how = dict(max_tokens=60, temperature=1, seed=seed, logit_bias=ENDLESS)
            events = self.server.stream("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], n=2, **how)
            whole = self.server.chat("hi", n=2, **how)["choices"]
            for index in range(2):
                mine = [choice for event in events for choice in event["choices"] if choice["index"] == index]
                self.assertEqual(mine[0]["delta"], {"role": "assistant", "content": ""})
                self.assertEqual("".join(choice["delta"].get("content", "") for choice in mine),
                                 whole[index]["message"]["content"])
                self.assertEqual([choice["finish_reason"] for choice in mine if choice["finish_reason"]], ["length"])
        self.assertNotIn("usage", events[0])

    def test_tells_drafted_tokens(self):
        for prompt in ("the", "the king the king the king the king"):
            events = self.server.stream("/v1/completions", prompt=prompt, max_tokens=200, temperature=0,
                                        logit_bias=ENDLESS)
            drafted = sum(event["choices"][0].get("drafted", False) for event in events)
            accepted = events[-1]["timings"]["draft_n_accepted"]
            self.assertLessEqual(drafted, accepted)
            # The last one's event tells how it ended, and a character of several tokens is one event.
            self.assertEqual(drafted > 0, accepted > 1)

    def test_timings_as_they_come(self):
        how = dict(prompt="the king the king the king", max_tokens=60, temperature=0, logit_bias=ENDLESS)
        events = self.server.stream("/v1/completions", timings_per_token=True, **how)
        written = [event["timings"]["predicted_n"] for event in events]
        self.assertEqual(written, sorted(written))
        self.assertEqual((written[0], written[-1]), (1, 60))
        for event in events:
            timings = event["timings"]
            self.assertLessEqual(timings["draft_n_accepted"], timings["draft_n"])
        self.assertEqual(sum("timings" in event for event in self.server.stream("/v1/completions", **how)), 1)

    def test_usage_comes_last(self):
        events = self.server.stream("/v1/completions", prompt="the", max_tokens=5, temperature=0, logit_bias=ENDLESS,
                                    stream_options={"include_usage": True})
        self.assertEqual(events[-1]["choices"], [])
        self.assertEqual(events[-1]["usage"]["completion_tokens"], 5)
        self.assertTrue(all(event["usage"] is None for event in events[:-1]))

    def test_stop_strings_do_not_leak(self):
        how = dict(max_tokens=80, temperature=1, seed=11, logit_bias=ENDLESS)
        text = self.server.complete("the", **how)["choices"][0]["text"]
        for at in (0, 7, len(text) // 2):
            stop = text[at:at + 5]
            events = self.server.stream("/v1/completions", prompt="the", stop=["never", stop], logprobs=0, **how)
            self.assertEqual("".join(event["choices"][0]["text"] for event in events), text[:text.index(stop)])
            self.assertEqual(events[-1]["choices"][0]["finish_reason"], "stop")
            answer = self.server.complete("the", stop=stop, **how)["choices"][0]
            self.assertEqual(answer["text"], text[:text.index(stop)])
            self.assertEqual(answer["finish_reason"], "stop")

    def test_http_1_0_and_several_requests_on_one_connection(self):
        body = json.dumps({"prompt": "the", "max_tokens": 4, "temperature": 0, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE) as plain:
            plain.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            reply = b"".join(iter(lambda: plain.recv(65536), b""))
        self.assertTrue(reply.endswith(b"data: [DONE]\n\n"), reply)
        self.assertNotIn(b"chunked", reply)
        connection = self.server.connect()
        for _ in range(3):
            connection.request("POST", "/v1/completions", body)
            response = connection.getresponse()
            self.assertEqual(response.status, 200)
            self.assertTrue(response.read().endswith(b"data: [DONE]\n\n"))
        connection.close()


class Thinking(WithServer):
    MODEL = "thinking"

    def test_the_template_opens_the_tag(self):
        message = self.server.chat("hi", max_tokens=10, logit_bias=ENDLESS)["choices"][0]["message"]
        self.assertEqual(message["content"], "")
        self.assertTrue(message["reasoning_content"])
        events = self.server.stream("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], temperature=0,
                                    max_tokens=10, logit_bias=ENDLESS)
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        self.assertEqual("".join(delta.get("reasoning_content", "") for delta in deltas), message["reasoning_content"])
        self.assertEqual("".join(delta.get("content", "") for delta in deltas), "")


class Errors(WithServer):
    ARGUMENTS = ["--max-body", "256K", "--max-header", "4K"]

    def bad(self, path, *words, param=None, **body):
        error = self.assertError(self.server.ask("POST", path, body), 400, *words)
        self.assertEqual(error["type"], "invalid_request_error")
        if param:
            self.assertEqual(error["param"], param)
        return error

    def test_places_and_methods(self):
        self.assertError(self.server.ask("GET", "/nowhere"), 404, "nowhere")
        answer = self.server.ask("GET", "/v1/chat/completions")
        self.assertError(answer, 405, "POST")
        self.assertEqual(answer[1]["Allow"], "POST")
        self.assertIsNone(answer[2]["error"]["code"])
        self.assertEqual(self.server.ask("POST", "/health", "")[0], 405)
        self.assertEqual(self.server.ask("OPTIONS", "/v1/models")[0], 405)
        self.assertEqual(self.server.ask("HEAD", "/health")[0], 200)

    def test_bodies(self):
        for body in ("", "{", "[1]", '"x"', "{\"prompt\": \"\\ud800\"}", b'{"prompt": "\xff"}', "[" * 100000,
                     '{"prompt": "x", "temperature": NaN}', '{"prompt": "x", "temperature": 1e999}',
                     '{"a":' * 70 + "1" + "}" * 70):
            self.assertError(self.server.ask("POST", "/v1/completions", body), 400)

    def test_numbers(self):
        for key, values in {"n": [0, -1, 1 << 40, 1.5, "1", True], "temperature": [-1, 101, "hot", True, [1]], "top_p": [-0.1, 1.1],
                            "top_k": [-2, 1e30], "min_p": [2], "max_tokens": [-1, 1 << 60, 0.5, "7", 1e300],
                            "presence_penalty": [3], "frequency_penalty": [-3], "repetition_penalty": [0, -1],
                            "logprobs": [-1, 1000, 2.5], "seed": [0.5, "x", 1e30, 1 << 63, 2.0 ** 63], "stream": ["yes", 1],
                            "stop": [5, [5], [""], "", ["x"] * 17], "logit_bias": [[], {"x": 1}, {"-1": 1}, {"5": 101}, {"5": "x"}, {"99999": 1}],
                            "echo": [1], "best_of": [2], "suffix": ["x"], "stream_options": [5, {"include_usage": True}]}.items():
            for value in values:
                with self.subTest(key=key, value=value):
                    error = self.bad("/v1/completions", key, prompt="x", **{key: value})
        for key, values in {"top_logprobs": [5, -1, 21], "max_tokens": [0], "max_completion_tokens": [0, -5]}.items():
            for value in values:
                self.bad("/v1/chat/completions", key, messages=[{"role": "user", "content": "x"}], **{key: value})

    def test_prompts(self):
        for prompt in (None, 5, [], [[]], [5, "x"], ["x", 5], [-1], [1 << 40], [99999], {"a": 1}, [1.5], [None]):
            with self.subTest(prompt=prompt):
                self.bad("/v1/completions", "prompt", prompt=prompt)
        # More than the context has room for.
        error = self.bad("/v1/completions", "context", prompt="x" * 5000)
        self.assertEqual(error["code"], "context_length_exceeded")

    def test_messages(self):
        for messages in (None, 5, [], [5], [{}], [{"role": "user"}], [{"role": "king", "content": "x"}], [{"role": 5, "content": "x"}],
                         [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url"}]}],
                         [{"role": "assistant", "tool_calls": 5}], [{"role": "assistant", "tool_calls": [{}]}]):
            with self.subTest(messages=messages):
                self.bad("/v1/chat/completions", "messages", messages=messages)

    def test_tools_and_forms(self):
        def bad(*words, **more):
            self.bad("/v1/chat/completions", *words, messages=[{"role": "user", "content": "x"}], **more)
        for tools in (5, [5], [{}], [{"type": "function"}], [{"type": "function", "function": {"name": ""}}],
                      [{"type": "function", "function": {"name": "a b"}}], [{"type": "retrieval", "function": {"name": "a"}}],
                      [WEATHER, WEATHER], [{"type": "function", "function": {"name": "a", "parameters": 5}}]):
            with self.subTest(tools=tools):
                bad("tools", tools=tools)
        for choice in ("any", 5, "required", {"type": "function"}, {"type": "function", "function": {"name": "x"}}):
            with self.subTest(choice=choice):
                bad("tool_choice", tool_choice=choice)
        bad("functions", functions=[])
        for form in (5, {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}},
                     {"type": "json_schema", "json_schema": {"schema": {"type": "king"}}},
                     {"type": "json_schema", "json_schema": {"schema": {"$ref": "https://example.org"}}}):
            with self.subTest(form=form):
                bad("response_format", response_format=form)
        for kwargs in (5, {"messages": []}, {"tools": []}, {"add_generation_prompt": False}, {"bos_token": "x"}):
            bad("chat_template_kwargs", chat_template_kwargs=kwargs)

    def test_what_is_no_http(self):
        def send(raw, patience=5):
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=patience) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(raw)
                reply = b""
                with contextlib.suppress(OSError):
                    while piece := connection.recv(65536):
                        reply += piece
                return reply
        post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
        for raw, status in ((b"hello\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
                            (b"GET /health HTTP/9.9\r\n\r\n", 400), (b"GET /he alth HTTP/1.1\r\n\r\n", 400),
                            (b"GET /health HTTP/1.1\r\nA: " + b"x" * 10000 + b"\r\n\r\n", 431),
                            (b"GET /health HTTP/1.1\r\n" + b"A: x\r\n" * 10000 + b"\r\n", 431),
                            (b"GET /" + b"x" * 10000 + b" HTTP/1.1\r\n\r\n", 431),
                            (post + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n", 400),
                            (post + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n", 400),
                            (post + b"Transfer-Encoding: chunked\r\n\r\n" + b"40000\r\n" + b"x" * 0x40000 + b"\r\n1\r\nx\r\n", 413),
                            (post + b"Content-Length: -2\r\n\r\n", 400), (post + b"Content-Length: 99999999\r\n\r\n", 413),
                            (post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
                            (post + b"Content-Length: 300000\r\n\r\n" + b"x" * 300000, 413)):
            with self.subTest(raw=raw[:60]):
                reply = send(raw)
                self.assertTrue(reply.startswith(b"HTTP/1.1 %d " % status), reply[:200])
                body = json.loads(reply.split(b"\r\n\r\n", 1)[1])
                self.assertTrue(body["error"]["message"])
        self.assertTrue(send(b"GET /\xff\x8f HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 404 "))
        reply = send(b"GET /x%0d%0aSet-Cookie:a HTTP/1.1\r\nConnection: close\r\n\r\n")
        self.assertTrue(reply.startswith(b"HTTP/1.1 404 "))
        self.assertNotIn(b"\r\nSet-Cookie", reply)
        self.assertEqual(self.server.get("/health"), {"status": "ok"})


class Keys(unittest.TestCase):
    def test_keys_origins_and_names(self):
        keys = commands.write("keys.txt", "# for tests\nking key\n\nthird\n")
        with Server("--api-key-file", keys, "--alias", "deep", "--cors", "https://example.org",
                    environment={"LATENTE_API_KEY": "first"}) as server:
            def status(path="/v1/models", **headers):
                return server.ask("GET", path, headers=headers)[0]
            self.assertEqual(status("/health"), 200)
            for path in ("/v1/models", "/metrics", "/slots", "/props"):
                self.assertEqual(status(path), 401)
            for key in ("first", "king key", "third"):
                self.assertEqual(status(Authorization="Bearer " + key), 200)
            self.assertEqual(status(Authorization="bearer first"), 200)
            for header in ("Bearer ", "Bearer firs", "Bearer firstfirst", "Bearer fourth", "first", "Basic first"):
                self.assertEqual(status(Authorization=header), 401)
            answer = server.ask("GET", "/v1/models", headers={"Authorization": "Bearer x"})
            self.assertEqual(answer[2]["error"]["code"], "invalid_api_key")
            headers = {"Authorization": "Bearer first", "Origin": "https://example.org"}
            found = server.ask("GET", "/v1/models", headers=headers)
            self.assertEqual(found[1]["Access-Control-Allow-Origin"], "https://example.org")
            self.assertEqual(found[2]["data"][0]["id"], "deep")
            preflight = server.ask("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://example.org"})
            self.assertEqual(preflight[0], 204)
            self.assertEqual(preflight[1]["Access-Control-Allow-Headers"], "Authorization, *")
            self.assertEqual(server.ask("GET", "/v1/models", headers=headers | {"Origin": "https://evil.org"})[0], 403)
            text = server.log.read_text()
        for secret in ("first", "king", "third"):
            self.assertNotIn(secret, text)

    def test_other_origins_are_kept_out(self):
        with Server() as server:
            self.assertEqual(server.ask("POST", "/v1/completions", {"prompt": "x"}, {"Origin": "https://evil.org"})[0], 403)
            self.assertEqual(server.ask("POST", "/v1/completions", {"prompt": "x"}, {"Origin": "null"})[0], 403)
            own = f"http://127.0.0.1:{server.port}"
            found = server.ask("POST", "/v1/completions", {"prompt": "x"}, {"Origin": own})
            self.assertEqual(found[0], 200)
            self.assertNotIn("Access-Control-Allow-Origin", found[1])

    def test_tls(self):
        done = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out",
                               "cert.pem", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
                              cwd=commands.HOME, capture_output=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        with Server("--tls-cert", "cert.pem", "--tls-key", "key.pem") as server:
            trust = ssl.create_default_context(cafile=commands.HOME / "cert.pem")
            connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=PATIENCE, context=trust)
            for _ in range(2):
                connection.request("POST", "/v1/completions", json.dumps({"prompt": "the", "max_tokens": 3, "stream": True}))
                response = connection.getresponse()
                self.assertEqual(response.status, 200)
                self.assertTrue(response.read().endswith(b"data: [DONE]\n\n"))
            connection.close()
            # The end is said, so that nobody can cut a reply short unnoticed.
            strict = trust.wrap_socket(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE),
                                       server_hostname="127.0.0.1", suppress_ragged_eofs=False)
            strict.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            self.assertTrue(b"".join(iter(lambda: strict.recv(65536), b"")).endswith(b'{"status":"ok"}'))
            strict.close()
            # Who does not even greet does not hold up the end.
            silent = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
            self.assertEqual(self.ends_in(server), 0)
            silent.close()
        wrong = subprocess.run([commands.LATENTE, "serve", "chat", "--port", "0", "--tls-cert", "key.pem", "--tls-key", "key.pem"],
                               cwd=commands.HOME, capture_output=True, timeout=PATIENCE, text=True)
        self.assertEqual(wrong.returncode, 1)
        self.assertIn("key.pem: expected a certificate", wrong.stderr)

    @staticmethod
    def ends_in(server, seconds=10):
        server.process.send_signal(signal.SIGTERM)
        return server.process.wait(seconds)

    def test_a_log_that_cannot_be_written(self):
        # A disk that is full, and a pipe that nobody reads any more.
        for log in ("/dev/full", "-"):
            with Server(log=log) as server:
                server.process.stdout.close()
                for _ in range(3):
                    self.assertEqual(server.complete("the", max_tokens=2)["usage"]["completion_tokens"], 2)
                self.assertEqual(self.ends_in(server), 0)

    def test_what_cannot_start(self):
        with Server() as server:
            for arguments, words in (([commands.HOME / "tokenizer"], "model.safetensors"), (["chat", "--port", server.port], "listen"),
                                     (["chat", "--host", "nowhere"], "--host"), (["chat", "--api-key-file", commands.write("none", "\n")], "keys"),
                                     (["chat", "--tls-cert", commands.HOME / "none"], "together"),
                                     (["chat", "--access-log", "/nowhere/log"], "nowhere")):
                port = [] if "--port" in arguments else ["--port", 0]
                done = commands.latente("serve", *arguments, *port, status=1)
                self.assertIn(words, done.stderr)


class Limits(WithServer):
    ARGUMENTS = ["--parallel", 2, "--queue", 2, "--connections", 12, "--idle-seconds", 1.5, "--receive-seconds", 1.5,
                 "--send-seconds", 2, "--request-seconds", 3, "--ctx-size", 400000, "--cache-tokens", 900000, "--max-tokens", 300000]

    def begin(self, **more):
        """A connection on which a long stream has begun."""
        connection = self.server.connect()
        body = {"prompt": "the", "temperature": 0, "max_tokens": 300000, "logit_bias": ENDLESS, "stream": True, **more}
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        self.assertEqual(response.status, 200)
        return connection, response

    def tearDown(self):
        commands.wait_for(lambda: self.server.running() == 0, "the engine is idle")

    def test_who_leaves_frees_the_place(self):
        connection, response = self.begin()
        response.readline()
        self.assertEqual(self.server.running(), 1)
        begin = time.monotonic()
        response.close()
        connection.close()
        commands.wait_for(lambda: self.server.running() == 0, "the place is free")
        self.assertLess(time.monotonic() - begin, 1)

    def test_who_leaves_before_the_first_token_too(self):
        held = [self.begin() for _ in range(2)]
        waiting = self.server.connect()
        waiting.request("POST", "/v1/completions", json.dumps({"prompt": "a queen", "max_tokens": 9}))
        commands.wait_for(lambda: self.server.metric("latente_sequences_waiting") == 1, "it waits")
        waiting.close()
        commands.wait_for(lambda: self.server.metric("latente_sequences_waiting") == 0, "it waits no more")
        for connection, response in held:
            response.close()
            connection.close()

    def test_a_full_queue(self):
        held = [self.begin() for _ in range(4)]  # two run, two wait
        status, headers, body = self.server.ask("POST", "/v1/completions", {"prompt": "x"})
        self.assertEqual(status, 429)
        self.assertEqual(headers["Retry-After"], "1")
        self.assertEqual(body["error"]["type"], "rate_limit_error")
        for connection, response in held:
            response.close()
            connection.close()
        commands.wait_for(lambda: self.server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200, "room")

    def test_a_reply_ends_in_time(self):
        begin = time.monotonic()
        answer = self.server.complete("the", max_tokens=300000, logit_bias=ENDLESS)
        self.assertEqual(answer["choices"][0]["finish_reason"], "length")
        self.assertLess(answer["usage"]["completion_tokens"], 300000)
        self.assertLess(time.monotonic() - begin, 10)

    def test_slow_clients_lose_their_connection(self):
        def closes_after(raw, piece=b"", wait=0.2):
            begin = time.monotonic()
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE) as connection:
                connection.sendall(raw)
                connection.settimeout(wait)
                while time.monotonic() - begin < PATIENCE:
                    try:
                        if connection.recv(4096) == b"":
                            return time.monotonic() - begin
                    except TimeoutError:
                        with contextlib.suppress(OSError):
                            connection.sendall(piece)
                    except OSError:
                        return time.monotonic() - begin
        self.assertLess(closes_after(b""), 5)
        self.assertLess(closes_after(b"GET /health HTTP/1.1\r\nX: ", b"y"), 5)
        self.assertLess(closes_after(b"POST /tokenize HTTP/1.1\r\nContent-Length: 10000\r\n\r\n", b"x"), 5)

    def stream_without_reading(self):
        """A connection that has asked for an endless stream, and never reads it."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", self.server.port))
        body = json.dumps({"prompt": "the", "temperature": 0, "max_tokens": 300000, "logit_bias": ENDLESS, "stream": True,
                           "logprobs": 5})
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        commands.wait_for(lambda: self.server.running() == 1, "it runs")
        return connection

    def test_who_does_not_read_is_dropped(self):
        with self.stream_without_reading():
            commands.wait_for(lambda: self.server.running() == 0, "it is dropped")

    def test_more_at_once_than_could_ever_run(self):
        begin = time.monotonic()
        status, _, body = self.server.ask("POST", "/v1/completions", {"prompt": ["king " * 200] * 256, "n": 128})
        self.assertEqual((status, body["error"]["code"]), (429, "queue_full"))
        self.assertLess(time.monotonic() - begin, PATIENCE / 4)

    def test_who_does_not_read_and_leaves_frees_the_place(self):
        connection = self.stream_without_reading()
        time.sleep(0.5)  # until sockets hold no more
        self.assertEqual(self.server.running(), 1)
        begin = time.monotonic()
        connection.close()
        commands.wait_for(lambda: self.server.running() == 0, "the place is free")
        self.assertLess(time.monotonic() - begin, 1)

    def test_too_many_connections(self):
        held = [socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE) for _ in range(12)]
        def refused():
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE) as one:
                one.sendall(b"GET /health HTTP/1.1\r\n\r\n")
                return b" 503 " in one.recv(4096)[:20]
        commands.wait_for(refused, "a connection is refused")
        for connection in held:
            connection.close()
        commands.wait_for(lambda: not_refused(self.server), "connections are taken again")


def not_refused(server):
    try:
        return server.ask("GET", "/health")[0] == 200
    except OSError:
        return False


class Drain(unittest.TestCase):
    LONG = {"prompt": "the", "temperature": 0, "max_tokens": 20000, "logit_bias": ENDLESS, "stream": True}
    ARGUMENTS = ["--ctx-size", 40000, "--parallel", 4]

    def start(self, server):
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps(self.LONG))
        response = connection.getresponse()
        response.readline()
        return connection, response

    def test_replies_under_way_end(self):
        server = Server(*self.ARGUMENTS)
        idle = server.connect()
        idle.request("GET", "/health")
        idle.getresponse().read()
        connection, response = self.start(server)
        server.process.send_signal(signal.SIGTERM)
        commands.wait_for(lambda: not self.accepts(server), "no more connections")
        self.assertEqual(idle.sock.recv(10), b"")  # closed at once
        text = response.read()
        self.assertTrue(text.endswith(b"data: [DONE]\n\n"))
        connection.close()
        self.assertEqual(server.process.wait(PATIENCE), 0)
        self.assertEqual(server.records()[-1]["completion_tokens"], 20000)
        server.process.communicate()

    def test_not_for_ever(self):
        for signals, arguments in ((1, ["--drain-seconds", 0.5]), (2, [])):
            server = Server(*self.ARGUMENTS, *arguments)
            connection, response = self.start(server)
            for _ in range(signals):
                server.process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            self.assertEqual(server.process.wait(5), 0)
            with self.assertRaises((OSError, http.client.HTTPException)):
                response.read()
            connection.close()
            server.process.communicate()

    @staticmethod
    def accepts(server):
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE).close()
            return True
        except OSError:
            return False


class Together(WithServer):
    ARGUMENTS = ["--parallel", 8]

    def test_batched_answers_are_those_of_requests_alone(self):
        def ask(i):
            return self.server.complete(f"the king {i} said " * (1 + i % 7), max_tokens=20 + 7 * (i % 5))
        alone = [ask(i)["choices"] for i in range(24)]
        with Server("--parallel", 8) as fresh:
            self_server, self.__class__.server = self.server, fresh  # with nothing in its cache
            try:
                with concurrent.futures.ThreadPoolExecutor(24) as threads:
                    together = [answer["choices"] for answer in threads.map(ask, range(24))]
            finally:
                self.__class__.server = self_server
        self.assertEqual(together, alone)

    def test_healthy_clients_beside_broken_ones(self):
        expected = self.server.complete("the king", max_tokens=40)["choices"]
        stop = threading.Event()
        def break_things():
            while not stop.is_set():
                connection = self.server.connect()
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection.request("POST", "/v1/completions", json.dumps(
                        {"prompt": "a queen", "max_tokens": 3000, "logit_bias": ENDLESS, "stream": True}))
                    connection.getresponse().readline()
                connection.close()
                self.server.ask("POST", "/v1/completions", "{broken")
        threads = [threading.Thread(target=break_things) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):
                self.assertEqual(self.server.complete("the king", max_tokens=40)["choices"], expected)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        commands.wait_for(lambda: self.server.running() == 0, "all are gone")

    def test_metrics(self):
        before = self.server.metric("latente_generated_tokens_total")
        self.server.complete("the", max_tokens=10, logit_bias=ENDLESS)
        self.assertEqual(self.server.metric("latente_generated_tokens_total"), before + 10)
        text = self.server.get("/metrics")
        names = set()
        for line in text.splitlines():
            if line.startswith("# "):
                self.assertRegex(line, r"^# (HELP|TYPE) latente_\w+ .+")
                names.add(line.split()[2])
            else:
                self.assertRegex(line, r'^latente_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [-+0-9.e]+$')
                self.assertIn(re.sub(r"_(bucket|sum|count)$", "", re.match(r"\w+", line).group()), names)
        count = self.server.metric("latente_first_token_seconds_count")
        self.assertEqual(self.server.metric('latente_first_token_seconds_bucket{le="+Inf"}'), count)

    def test_the_access_log_has_no_prompts(self):
        self.server.complete("a secret thing", max_tokens=3, logit_bias=ENDLESS)
        commands.wait_for(lambda: any(record["target"] == "/v1/completions" for record in self.server.records()), "a record")
        record = [record for record in self.server.records() if record["target"] == "/v1/completions"][-1]
        self.assertEqual((record["method"], record["status"], record["completion_tokens"]), ("POST", 200, 3))
        self.assertNotIn("secret", self.server.log.read_text())


if __name__ == "__main__":
    commands.LATENTE, commands.REFERENCE = os.path.abspath(sys.argv[1]), pathlib.Path(sys.argv[2]).absolute()
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
