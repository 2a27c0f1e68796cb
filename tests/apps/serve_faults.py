#!/usr/bin/env python3
"""By hand: what a server makes of clients that send nonsense, leave, dawdle, or are too many, while healthy ones
beside them must get the right answer. Usage: serve_faults.py LATENTE MODEL [SECONDS]"""

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
PATIENCE = 60
BODY = {"prompt": "the king said", "max_tokens": 40, "temperature": 0}
SEEDS = [json.dumps(body).encode() for body in (
    BODY, BODY | {"stream": True, "logprobs": 2, "echo": True, "n": 2, "stop": ["x"], "seed": 1},
    {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "response_format": {"type": "json_object"}},
    {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "tool_choice": "required", "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": [1]}}}}}]},
    {"content": "the", "tokens": [1, 2], "with_pieces": True})]
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/apply-template", "/slots", "/x"]


def memory(process):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) // 1024


def start():
    process = subprocess.Popen([LATENTE, "serve", MODEL, "--port", "0", "--ctx-size", "4096", "--access-log", "",
                                "--idle-seconds", "3", "--receive-seconds", "3", "--connections", "400"],
                               stderr=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+);", process.stderr.readline()).group(1))
    process.stderr.readline()
    return process, port


def ask(port, body=BODY):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


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
    raw = bytearray(request.encode() + text)
    if rng.random() < 0.3:  # the head, too
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(request))] = rng.randrange(256)
    return bytes(raw)


def send(port, raw):
    """The status that comes back; what else there was instead."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(raw)
            reply = connection.recv(65536)
            while connection.recv(65536):
                pass
    except TimeoutError:
        return "nothing in 10 s"
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
    """Clients that ask the same all the while; every answer must be the first one's."""

    def __init__(self, port):
        self.port, self.right, self.wrong, self.stop = port, 0, [], False
        self.expected = ask(port)[1]["choices"]
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while not self.stop:
            status, answer = ask(self.port)
            if status == 200 and answer["choices"] == self.expected:
                self.right += 1
            elif status != 429:
                self.wrong.append((status, answer))

    def end(self):
        self.stop = True
        self.thread.join()
        return f"healthy client: {self.right} right answers, {len(self.wrong)} wrong" + (f" {self.wrong[:1]}" if self.wrong else "")


def malformed(port):
    found, lock = collections.Counter(), threading.Lock()
    def work(seed):
        rng = random.Random(seed)
        for _ in range(2500):
            status = send(port, mutated(rng))
            with lock:
                found[status] += 1
    several(4, work)
    return dict(found)


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
    return f"200 slow clients: closed after seconds {dict(closed)}"


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
    return f"{with_signal.name} with 64 requests under way: {dict(results)}, exit status {process.wait(PATIENCE)}"


def main():
    process, port = start()
    print("memory, MB:", memory(process))
    for name, fault in (("malformed", malformed), ("malformed again", malformed), ("leaving", leaving), ("dawdling", dawdling)):
        healthy = Healthy(port)
        print(f"{name}: {fault(port)}; {healthy.end()}; memory, MB: {memory(process)}", flush=True)
    time.sleep(1)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/slots")
    print("places still taken:", sum(slot["is_processing"] for slot in json.loads(connection.getresponse().read())))
    connection.close()
    print(under_load(port, process, signal.SIGTERM), flush=True)
    process, port = start()
    print(under_load(port, process, signal.SIGKILL), flush=True)
    process, port = start()
    print("after that, a new one:", ask(port)[0])
    process.send_signal(signal.SIGTERM)
    print("exit status", process.wait(PATIENCE))


main()
