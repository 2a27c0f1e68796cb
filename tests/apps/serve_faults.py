#!/usr/bin/env python3
"""By hand: what a server makes of clients that send nonsense, leave, dawdle, or are too many, and of signals, while
healthy ones beside them must get the right answer, byte for byte. Fails if they do not, if memory grows from one round to the
next, or if a server ends otherwise than it should (with sanitizers: if it has anything to report, leaks too).
Usage: serve_faults.py LATENTE MODEL [SECONDS [REQUESTS]]"""

import collections
import http.client
import json
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

LATENTE, MODEL = sys.argv[1:3]
SECONDS = float(sys.argv[3]) if len(sys.argv) > 3 else 60
REQUESTS = int(sys.argv[4]) if len(sys.argv) > 4 else 10000
PATIENCE = 600
GROWTH = 4  # MB that the third round may add: by then pages, plans and grammars that are kept are there
BODY = {"prompt": "the king said", "max_tokens": 40, "temperature": 0}
SEEDS = [json.dumps(body).encode() for body in (
    BODY, BODY | {"stream": True, "logprobs": 2, "echo": True, "n": 2, "stop": ["x"], "seed": 1},
    {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "response_format": {"type": "json_object"}},
    {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "tool_choice": "required", "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": [1]}}}}}]},
    {"content": "the", "tokens": [1, 2], "with_pieces": True})]
FAILURES = []
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/apply-template", "/slots", "/x"]


def memory(process):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) // 1024


def must(right, what):
    if not right:
        FAILURES.append(what)
        print("FAILED:", what, flush=True)


def start(port=0):
    process = subprocess.Popen([LATENTE, "serve", MODEL, "--port", str(port), "--ctx-size", "4096", "--cache-tokens", "32768",
                                "--access-log", "",
                                "--idle-seconds", "3", "--receive-seconds", "3", "--send-seconds", "3",
                                "--drain-seconds", str(PATIENCE), "--request-seconds", str(PATIENCE // 2), "--connections", "400"],
                               stderr=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+);", process.stderr.readline()).group(1))
    process.stderr.readline()
    return process, port


def end_of(process, expected):
    """Its exit status, and what else it had to say."""
    said = process.communicate(timeout=PATIENCE)[1]
    must(process.returncode == expected and not said, f"exit status {process.returncode} {said[-5000:]}")
    return process.returncode


def raw(port, body):
    """The status and the bytes of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer


def ask(port, body=BODY):
    status, answer = raw(port, body)
    return status, json.loads(answer)


def lasting(answer):
    """Without what differs from one answer to the next: its name, its time, and how long it took."""
    answer = re.sub(rb'"id":"[^"]*","object":"([a-z_.]*)","created":\d+', rb'\1', answer)
    return re.sub(rb'"(cached_tokens|cache_n|draft_n|draft_n_accepted|prompt_n|[a-z]+_ms|[a-z]+_per_second)":[-+.e\d]+|'
                  rb',"drafted":true', b"", answer)


def mutated(rng):
    text = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            text[at:at + rng.randrange(6)] = b""
        elif kind == 1:
            text[at:at] = rng.choice([b"[", b"{", b'"', b"-", b"9" * 30, b"null", b"1e999", b"\xff", b"\\ud800", b"\0"])
        elif kind == 2 and at < len(text):
            text[at] = rng.randrange(256)
        else:
            other = rng.choice(SEEDS)
            cut = rng.randrange(len(other))
            text[at:at + 9] = other[cut:cut + 9]
    request = f"POST {rng.choice(PATHS)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(text)}\r\n\r\n"
    whole = bytearray(request.encode() + text)
    kind = rng.random()
    if kind < 0.3:  # the head, too
        for _ in range(rng.randrange(1, 4)):
            whole[rng.randrange(len(request))] = rng.randrange(256)
    elif kind < 0.4:  # in chunks, whose sizes may be wrong
        whole = bytearray(request.replace(f"Content-Length: {len(text)}", "Transfer-Encoding: chunked").encode())
        for at in range(0, len(text), 50):
            piece = text[at:at + 50]
            size = len(piece) if rng.random() < 0.98 else rng.choice([-2, 0, 1 << 70, len(piece) + 1])
            whole += b"%x\r\n%s\r\n" % (size, piece)
        whole += b"0\r\n\r\n"
    elif kind < 0.402:  # a part of it
        del whole[rng.randrange(1, len(whole)):]
    return bytes(whole)


def send(port, request):
    """The status that comes back; what else there was instead."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(request)
            reply = connection.recv(65536)
            while connection.recv(65536):
                pass
    except TimeoutError:
        return "nothing"
    except ConnectionError:
        return "closed"
    return reply[9:12].decode() if reply.startswith(b"HTTP/1.1 ") else "closed without a word"


def several(count, work):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Healthy:
    """Two clients that ask the same all the while, whole and streamed; every answer must be the first one's."""

    def __init__(self, port):
        self.port, self.right, self.wrong, self.stop = port, 0, [], False
        self.threads = [threading.Thread(target=self.run, args=(BODY | {"stream": stream},)) for stream in (False, True)]
        for thread in self.threads:
            thread.start()

    def run(self, body):
        expected = lasting(raw(self.port, body)[1])
        while not self.stop:
            status, answer = raw(self.port, body)
            if status == 200 and lasting(answer) == expected:
                self.right += 1
            elif status != 429:
                self.wrong.append((status, answer, expected))

    def end(self):
        self.stop = True
        for thread in self.threads:
            thread.join()
        must(self.right > 0 and not self.wrong, f"a healthy client's answer: {self.wrong[:1]}")
        return f"healthy clients: {self.right} right answers, {len(self.wrong)} wrong"


def malformed(port):
    found, lock = collections.Counter(), threading.Lock()
    def work(seed):
        rng = random.Random(seed)
        for _ in range(REQUESTS // 4):
            status = send(port, mutated(rng))
            with lock:
                found[status] += 1
    several(4, work)
    must(found["nothing"] == 0 and not any(status.startswith("5") for status in found), f"malformed: {found}")
    return f"{sum(found.values())} requests: {dict(found.most_common())}"


def leaving(port):
    count = collections.Counter()
    end = time.monotonic() + SECONDS
    def work(seed):
        rng = random.Random(seed)
        body = json.dumps({"prompt": f"a queen {seed}", "max_tokens": 3000, "stream": True, "logit_bias": {"0": -100}}).encode()
        while time.monotonic() < end:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                for _ in range(rng.randrange(20)):
                    connection.recv(rng.randrange(1, 4000))
                if rng.random() < 0.5:  # with a reset
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            count["left"] += 1
    several(32, work)
    return f"{count['left']} streams left at random"


def dawdling(port):
    closed = collections.Counter()
    def work(i):
        begin = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + (b"Content-Length: 999\r\n\r\n" if i % 2 else b""))
                while time.monotonic() - begin < 30:
                    connection.sendall(b"X-A: b\r\n")
                    time.sleep(0.1)
        except OSError:
            closed[round(time.monotonic() - begin)] += 1
    several(200, work)
    must(closed.total() == 200, "slow clients are closed")
    return f"200 clients that send a line every 0.1 s: closed after seconds {dict(closed)}"


def taken(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/slots")
    count = sum(slot["is_processing"] for slot in json.loads(connection.getresponse().read()))
    connection.close()
    return count


def under_load(port, process, with_signal):
    results, lock = collections.Counter(), threading.Lock()
    def work(i):
        try:
            status, answer = ask(port, BODY | {"prompt": f"number {i}", "max_tokens": 1500, "logit_bias": {"0": -100}})
            result = f"{status}, " + (f"{answer['usage']['completion_tokens']} tokens" if status == 200 else "refused")
        except (OSError, http.client.HTTPException) as error:
            result = type(error).__name__
        with lock:
            results[result] += 1
    threads = [threading.Thread(target=work, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    process.send_signal(with_signal)
    for thread in threads:
        thread.join()
    status = end_of(process, 0 if with_signal == signal.SIGTERM else -with_signal)
    right = {"200, 1500 tokens": 64} if with_signal == signal.SIGTERM else None
    must(right is None or results == right, f"under load: {results}")
    return f"{with_signal.name} with 64 requests under way: {dict(results)}, exit status {status}"


def main():
    process, port = start()
    print("memory, MB:", memory(process))
    most = []
    for number, fault in enumerate((malformed, leaving, dawdling) * 3):
        healthy = Healthy(port)
        what = fault(port)
        right = healthy.end()
        now = memory(process)
        must(number < 6 or now <= max(most[:6]) + GROWTH, f"memory grows: {most} {now}")
        most.append(now)
        print(f"{what}; {right}; memory, MB: {now}", flush=True)
    time.sleep(1)
    left = taken(port)
    must(left == 0, f"{left} places are taken by nobody")
    print("places still taken:", left)
    print(under_load(port, process, signal.SIGTERM), flush=True)
    process, port = start(port)
    expected = lasting(raw(port, BODY)[1])
    print(under_load(port, process, signal.SIGKILL), flush=True)
    process, port = start(port)
    again = lasting(raw(port, BODY)[1])
    must(again == expected, "the answer of a server started anew")
    print("after that, a new one at the same port: the same answer" if again == expected else again)
    process.send_signal(signal.SIGTERM)
    print("exit status", end_of(process, 0))
    raise SystemExit(1 if FAILURES else 0)


main()
