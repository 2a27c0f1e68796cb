#!/usr/bin/env python3
"""Concurrent streaming clients of /v1/completions, of this server or another one that speaks OpenAI's protocol.

    serve_load.py PORT PROMPTS.jsonl --clients 16 --seconds 600 --tokens 128 --pid SERVER   # for a time
    serve_load.py PORT PROMPTS.jsonl --clients 16 --requests 512                            # each prompt once

PROMPTS.jsonl: {"prompt": TEXT} a line, as `latente batch` reads them. Each client asks greedily, reads its stream to the
end, and asks the next one on the same connection. One thread over epoll, so that it takes little of the machine; how
much is printed. Standard library alone."""

import argparse
import collections
import json
import os
import resource
import select
import socket
import time

DONE = b"data: [DONE]"


class Client:
    def __init__(self, port):
        self.port, self.socket = port, None

    def send(self, body, key):
        self.body, self.reused = body, self.socket is not None
        if self.socket is None:
            self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=60)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                            b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (key, len(body), body))
        self.begin = time.perf_counter()
        self.last, self.events, self.tail, self.head = None, 0, b"", True

    def close(self):
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def memory(pid):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024


def cpu_seconds(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values, share):
    """Of values, or of {value: how often}."""
    counts = sorted(values.items()) if isinstance(values, dict) else [(v, 1) for v in sorted(values)]
    rest = share * sum(n for _, n in counts)
    for value, n in counts:
        rest -= n
        if rest <= 0:
            return value
    return float("nan")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("port", type=int)
    p.add_argument("prompts")
    p.add_argument("--clients", type=int, default=16)
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--requests", type=int, help="as many instead, each prompt once")
    p.add_argument("--warm-up", type=float, default=0, help="seconds whose figures do not count")
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--end", type=int, default=0, help="the token that ends a text, which is banned")
    p.add_argument("--key", default="none")
    p.add_argument("--pid", type=int, help="the server's, for its memory")
    args = p.parse_args()

    prompts = [json.loads(line)["prompt"] for line in open(args.prompts)]
    bodies = [json.dumps({"prompt": prompt, "max_tokens": args.tokens, "temperature": 0, "stream": True, "ignore_eos": True,
                          "logit_bias": {str(args.end): -100}, "stream_options": {"include_usage": True}}).encode()
              for prompt in prompts]
    asked = 0
    clients, errors = {}, collections.Counter()
    first, gaps = [], collections.Counter()  # gaps between arrivals, in steps of 0.1 ms
    tokens = requests = events = counted_events = 0
    poll = select.epoll()
    start = time.perf_counter()
    end = start + args.seconds
    counts_from = start + args.warm_up
    resident, next_look = [], start
    server_cpu = cpu_seconds(args.pid) if args.pid else 0

    def ask(client, body=None):
        nonlocal asked
        if body is None and (asked >= args.requests if args.requests else time.perf_counter() >= end):
            client.close()
            return
        if body is None:
            body = bodies[asked % len(bodies)]
            asked += 1
        try:
            new = client.socket is None
            client.send(body, args.key.encode())
            if new:
                poll.register(client.socket, select.EPOLLIN)
            clients[client.socket.fileno()] = client
        except OSError as error:
            errors[f"{type(error).__name__} when asking"] += 1
            client.close()

    def fail(client, what):
        errors[what] += 1
        client.close()
        ask(client)

    for _ in range(args.clients):
        ask(Client(args.port))
    while clients:
        for number, _ in poll.poll(1):
            client = clients[number]
            try:
                data = client.socket.recv(1 << 18)
            except OSError as error:
                data = b""
                errors[type(error).__name__] += 1
            now = time.perf_counter()
            if not data:
                del clients[number]
                if client.head and client.reused:  # the server does not keep connections: on a new one
                    client.close()
                    ask(client, client.body)
                    continue
                fail(client, "closed before the end")
                continue
            if client.head and not data.startswith(b"HTTP/1.1 200 "):
                del clients[number]
                fail(client, data[9:12].decode(errors="replace"))
                continue
            client.head = False
            count = data.count(b"data: {")
            if count:
                client.events += count
                if client.last is None:
                    if now >= counts_from:
                        first.append(now - client.begin)
                elif now >= counts_from:
                    gaps[round((now - client.last) * 1e4)] += 1
                if now >= counts_from:
                    counted_events += count
                client.last = now
            client.tail = (client.tail + data)[-4096:]
            if not client.tail.endswith(b"0\r\n\r\n") or DONE not in client.tail:
                continue
            del clients[number]
            at = client.tail.rfind(b'"completion_tokens":')
            written = int(client.tail[at + 20:at + 30].split(b",")[0].split(b"}")[0])
            if written != args.tokens:
                errors[f"{written} tokens"] += 1
            tokens += written
            events += client.events
            requests += 1
            ask(client)
        if args.pid and time.perf_counter() >= next_look:
            resident.append(round(memory(args.pid), 1))
            next_look += max(args.seconds / 10, 5)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    counted = seconds - args.warm_up
    result = {
        "clients": args.clients, "seconds": round(seconds, 1), "requests": requests, "errors": dict(errors),
        "tokens_per_second": round(counted_events * tokens / max(events, 1) / counted, 1),
        "first_token_ms": [round(1e3 * percentile(first, share), 1) for share in (0.5, 0.99)],
        "between_tokens_ms": [round(percentile(gaps, share) / 10, 1) for share in (0.5, 0.99)],
        "client_cpu": round((usage.ru_utime + usage.ru_stime) / seconds, 3)}
    if args.pid:
        result["server_cpu"] = round((cpu_seconds(args.pid) - server_cpu) / seconds, 3)
        result["resident_mb"] = resident
    print(json.dumps(result), flush=True)
    raise SystemExit(1 if errors else 0)


main()
