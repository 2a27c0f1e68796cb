#!/usr/bin/env python3
"""Clients that people have, against `latente serve`: the openai package, curl, and Prometheus's own parser. Those that
are not installed are skipped; what openai called and got is printed as a table.
Usage: serve_clients.py LATENTE REFERENCE_MODELS [unittest's arguments]"""

import asyncio
import json
import os
import pathlib
import shutil
import subprocess
import sys
import typing
import unittest

import commands_test as commands
import serve_test

try:
    import openai
    import pydantic
except ImportError:
    openai = None
try:
    from prometheus_client import parser as prometheus
except ImportError:
    prometheus = None

KEY = "sk-test"
setUpModule, tearDownModule = serve_test.setUpModule, serve_test.tearDownModule


class Clients(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = serve_test.Server("--api-key", KEY, "--metrics-experts")
        cls.addClassCleanup(cls.server.__exit__)
        cls.url = f"http://127.0.0.1:{cls.server.port}"

    def test_curl(self):
        if not shutil.which("curl"):
            self.skipTest("no curl")
        def curl(*arguments):
            return subprocess.run(["curl", "-sS", "--fail-with-body", "-H", f"Authorization: Bearer {KEY}", *arguments],
                                  capture_output=True, text=True, timeout=commands.PATIENCE)
        body = json.dumps({"prompt": "the king", "max_tokens": 4, "temperature": 0})
        answer = json.loads(curl(self.url + "/v1/completions", "-d", body).stdout)
        self.assertEqual(answer["usage"]["completion_tokens"], 4)
        stream = curl("-N", self.url + "/v1/completions", "-d", body[:-1] + ', "stream": true}').stdout
        self.assertTrue(stream.endswith("data: [DONE]\n\n"))
        big = "x" * 3000  # curl asks with Expect: 100-continue
        self.assertEqual(curl(self.url + "/tokenize", "-d", json.dumps({"content": big})).returncode, 0)
        self.assertEqual(curl("-I", self.url + "/health").returncode, 0)
        self.assertNotEqual(curl(self.url + "/v1/completions", "-d", "{").returncode, 0)

    @unittest.skipUnless(prometheus, "no prometheus_client")
    def test_prometheus(self):
        headers = {"Authorization": "Bearer " + KEY}
        body = {"prompt": "the king said", "max_tokens": 8, "temperature": 0, "logit_bias": serve_test.ENDLESS}
        self.assertEqual(self.server.ask("POST", "/v1/completions", body, headers)[0], 200)
        def families():
            text = self.server.ask("GET", "/metrics", headers=headers)[2]
            found = list(prometheus.text_string_to_metric_families(text))
            self.assertEqual(len({family.name for family in found}), len(found))
            for family in found:
                self.assertTrue(family.documentation, family.name)
                self.assertIn(family.type, ("counter", "gauge", "histogram"))
                for sample in family.samples:
                    self.assertGreaterEqual(sample.value, 0)
                if family.type == "histogram":
                    buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
                    self.assertEqual(buckets, sorted(buckets))
                    self.assertEqual(buckets[-1], next(s.value for s in family.samples if s.name.endswith("_count")))
            return {family.name: family for family in found}
        commands.wait_for(lambda: sum(s.value for s in families()["latente_expert_tokens"].samples) > 0, "experts are counted")
        found = families()
        for name in ("requests", "generated_tokens", "drafted_tokens", "accepted_tokens", "cached_tokens"):
            self.assertEqual(found["latente_" + name].type, "counter")
        for name in ("first_token_seconds", "next_token_seconds", "waiting_seconds"):
            self.assertEqual(found["latente_" + name].type, "histogram")
        self.assertEqual(set(found["latente_expert_tokens"].samples[0].labels), {"layer", "expert"})
        self.assertTrue(all(sample.value >= 1 for sample in found["latente_expert_imbalance"].samples))


@unittest.skipUnless(openai, "no openai")
class OpenAi(unittest.TestCase):
    TABLE = []

    @classmethod
    def setUpClass(cls):
        cls.server = serve_test.Server("--api-key", KEY)
        cls.addClassCleanup(cls.server.__exit__)
        cls.url = f"http://127.0.0.1:{cls.server.port}"
        cls.client = openai.OpenAI(base_url=cls.url + "/v1", api_key=KEY, max_retries=0)

    @classmethod
    def tearDownClass(cls):
        print(f"\nopenai {openai.__version__}\n\n| what was called | what came back |\n|---|---|")
        for called, came in cls.TABLE:
            print(f"| {called} | {came} |")

    def row(self, called, came):
        self.TABLE.append((called, came))

    def chat(self, **more):
        return self.client.chat.completions.create(
            **{"model": "chat", "messages": [{"role": "user", "content": "weather?"}], "temperature": 0, **more})

    def test_1_models(self):
        names = [model.id for model in self.client.models.list()]
        self.assertEqual(names, ["chat"])
        self.row("`models.list()`, `models.retrieve('chat')`", f"`{names}`, `{self.client.models.retrieve('chat').id}`")

    def test_2_chats(self):
        how = dict(max_tokens=12, logit_bias=serve_test.ENDLESS)
        answer = self.chat(**how)
        self.assertEqual((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 12))
        self.row("`chat.completions.create`, max_tokens=12", f"`{answer.choices[0].finish_reason}`, {answer.usage.completion_tokens} tokens, "
                 f"`cached_tokens` {answer.usage.prompt_tokens_details.cached_tokens}")
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}, **how))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        self.assertEqual(text, answer.choices[0].message.content)
        self.assertEqual(chunks[-1].usage.completion_tokens, 12)
        self.row("… stream=True, include_usage", f"{len(chunks)} chunks, the same text, usage in the last one")
        answer = self.chat(n=3, seed=5, temperature=1, logprobs=True, top_logprobs=2, max_tokens=4, logit_bias=serve_test.ENDLESS)
        self.assertEqual([len(c.logprobs.content) for c in answer.choices], [4] * 3)
        self.assertEqual(len(answer.choices[0].logprobs.content[0].top_logprobs), 2)
        self.row("… n=3, seed, logprobs, top_logprobs=2", "3 choices with 4 entries each, 2 alternatives each")

    def test_3_tools(self):
        tools = dict(tools=[serve_test.WEATHER], parallel_tool_calls=False, max_tokens=300)
        answer = self.chat(tool_choice="required", **tools)
        call, = answer.choices[0].message.tool_calls
        self.assertEqual(answer.choices[0].finish_reason, "tool_calls")
        self.assertIn(json.loads(call.function.arguments)["city"], ("Paris", "Rome"))
        self.row("… tools, tool_choice=\"required\"", f"`tool_calls`: `{call.function.name}`, `{call.function.arguments}`")
        reply = self.chat(max_tokens=5, tools=[serve_test.WEATHER], messages=[
            {"role": "user", "content": "weather?"}, answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"}])
        self.row("… the call and the tool's answer sent back", f"a reply, `{reply.choices[0].finish_reason}`")
        pieces, name = [], None
        for chunk in self.chat(stream=True, tool_choice="required", **tools):
            for delta in chunk.choices[0].delta.tool_calls or []:
                name = name or delta.function.name
                pieces.append(delta.function.arguments)
        self.assertEqual((name, "".join(pieces)), ("weather", call.function.arguments))
        self.assertGreater(len(pieces), 3)
        self.row("… the same, stream=True", f"the name, and its arguments in {len(pieces)} pieces, the same text")
        with self.client.chat.completions.stream(model="chat", messages=[{"role": "user", "content": "weather?"}], temperature=0,
                                                 tool_choice="required", **tools) as stream:
            kinds = {event.type for event in stream}
            parsed = stream.get_final_completion().choices[0].message.tool_calls[0]
        self.assertIn("tool_calls.function.arguments.delta", kinds)
        self.assertEqual(parsed.function.arguments, call.function.arguments)
        self.row("`chat.completions.stream`, tools", "events " + ", ".join(f"`{kind}`" for kind in sorted(kinds)))
        free = self.chat(max_tokens=8, tools=[serve_test.WEATHER], logit_bias=serve_test.ENDLESS)
        self.assertTrue(free.choices[0].message.content)

    def test_4_structured_output(self):
        class Person(pydantic.BaseModel):
            name: typing.Literal["king", "queen"]
            age: int = pydantic.Field(ge=0, le=99)
        answer = self.client.chat.completions.parse(model="chat", messages=[{"role": "user", "content": "who?"}],
                                                    response_format=Person, max_tokens=200)
        self.assertIsInstance(answer.choices[0].message.parsed, Person)
        self.row("`chat.completions.parse(response_format=Person)`", f"`{answer.choices[0].message.parsed!r}`")

    def test_5_completions(self):
        how = dict(model="chat", prompt=["the king", "a queen"], max_tokens=5, temperature=0, logit_bias=serve_test.ENDLESS)
        answer = self.client.completions.create(echo=True, logprobs=2, **how)
        scores = [choice.logprobs for choice in answer.choices]
        self.assertTrue(all(score.token_logprobs[0] is None for score in scores))
        self.row("`completions.create`, two prompts, echo, logprobs=2",
                 f"{[len(score.tokens) for score in scores]} entries, `None` for the first")
        chunks = list(self.client.completions.create(stream=True, **how))
        self.row("… stream=True", f"{len(chunks)} chunks")

    def test_6_errors(self):
        def fails(kind, status, **more):
            with self.assertRaises(kind) as caught:
                self.chat(**more)
            self.assertEqual(caught.exception.status_code, status)
            return caught.exception
        error = fails(openai.BadRequestError, 400, temperature=9999)
        self.row("temperature=9999", f"`BadRequestError`, 400, param `{error.param}`")
        error = fails(openai.BadRequestError, 400, messages=[{"role": "user", "content": "x" * 9000}])
        self.row("a prompt longer than the context", f"`BadRequestError`, 400, `{error.code}`")
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.models.retrieve("other")
        self.row("`models.retrieve('other')`", f"`NotFoundError`, 404, `{caught.exception.code}`")
        with self.assertRaises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=self.url + "/v1", api_key="x", max_retries=0).models.list()
        self.row("a wrong key", f"`AuthenticationError`, 401, `{caught.exception.code}`")

    def test_7_async(self):
        async def run():
            client = openai.AsyncOpenAI(base_url=self.url + "/v1", api_key=KEY, max_retries=0)
            async def stream(i):
                events = await client.completions.create(model="chat", prompt=f"number {i}", max_tokens=20, temperature=0,
                                                         stream=True, logit_bias=serve_test.ENDLESS)
                return "".join([event.choices[0].text async for event in events])
            together = await asyncio.gather(*(stream(i) for i in range(32)))
            alone = [await stream(i) for i in range(32)]
            events = await client.completions.create(model="chat", prompt="x", max_tokens=3000, stream=True)
            async for _ in events:
                break
            await events.close()
            return together, alone
        together, alone = asyncio.run(run())
        self.assertEqual(together, alone)
        self.row("`AsyncOpenAI`: 32 streams at once, and one closed early", "each text equal to that of the same request alone")


if __name__ == "__main__":
    commands.LATENTE, commands.REFERENCE = os.path.abspath(sys.argv[1]), pathlib.Path(sys.argv[2]).absolute()
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
