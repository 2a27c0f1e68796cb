#!/usr/bin/env python3
"""Runs the program itself: what each command takes, prints, writes and answers to signals.
Usage: commands_test.py LATENTE REFERENCE_MODELS [unittest's arguments]"""

import json
import math
import os
import pathlib
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

LATENTE = ""
REFERENCE = pathlib.Path()
HOME = pathlib.Path()  # of everything a test writes
PATIENCE = 120  # seconds that nothing takes unless it hangs

END = 0  # the id of <|endoftext|>; banned where replies have to go on
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": 4,
    "routed_scaling_factor": 1.0, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_layer_freq": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "hidden_act": "silu", "max_position_embeddings": 1 << 20, "initializer_range": 0.15,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "float32"}
TRAIN = """
out = "run"
steps = 4
[model]
config = "config.json"
tokenizer = "tokenizer"
[data]
files = ["text.txt"]
validation_share = 0.05
cache = "cache"
[batch]
tokens = 512
length = 128
[log]
tensorboard = false
peak_gflops = 1
"""


def latente(*arguments, status=0, stdin=""):
    """The finished command, which must end with `status`."""
    done = subprocess.run([LATENTE, *map(str, arguments)], cwd=HOME, input=stdin.encode(), capture_output=True,
                          timeout=PATIENCE)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    if done.returncode != status:
        raise AssertionError(f"{arguments}: status {done.returncode}, expected {status}\n{done.stdout}\n{done.stderr}")
    return done


def write(name, text):
    path = HOME / name
    path.write_text(text)
    return path


def write_lines(name, rows):
    return write(name, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def wait_for(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.001)


def catches_interrupts(process):
    """Whether it has a handler for SIGINT by now."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"^SigCgt:\s*(\w+)", status, re.M).group(1), 16) >> (signal.SIGINT - 1) & 1 == 1


def setUpModule():
    global HOME
    HOME = pathlib.Path(tempfile.mkdtemp(prefix="latente-commands-"))
    choose = random.Random(1)
    words = "king queen said unto the and of woman man house went day night river stone light".split()
    documents = [" ".join(choose.choice(words) for _ in range(120)) + "." for _ in range(40)]
    write("text.txt", "\n<|endoftext|>\n".join(documents))
    write("config.json", json.dumps(CONFIG))
    write("train.toml", TRAIN)
    latente("tokenizer", "train", "text.txt", "--vocab-size", 320, "--out", "tokenizer")
    latente("train", "train.toml")
    shutil.copytree(HOME / "run/model", HOME / "model")


def tearDownModule():
    shutil.rmtree(HOME)


class Generate(unittest.TestCase):
    def test_continues_the_prompt_on_standard_output(self):
        done = latente("generate", "model", "--prompt", "the king", "-n", 20, "--temperature", 0, "--stats")
        self.assertTrue(done.stdout.startswith("the king"))
        self.assertIn("prompt      3 tokens (0 from the cache)", done.stderr)
        bare = latente("generate", "model", "--prompt", "the king", "-n", 20, "--temperature", 0, "--no-echo", "--plain")
        self.assertEqual("the king" + bare.stdout, done.stdout)
        self.assertEqual(bare.stderr, "")
        for more in (["-f", write("prompt.txt", "the king")], ["-f", "-"]):
            again = latente("generate", "model", *more, "-n", 20, "--temperature", 0, stdin="the king")
            self.assertEqual(again.stdout, done.stdout)

    def test_a_seed_stands_for_a_text(self):
        texts = [latente("generate", "model", "-p", "the", "-t", 1, "-n", 40, "--seed", seed).stdout for seed in (5, 5, 6)]
        self.assertEqual(texts[0], texts[1])
        self.assertNotEqual(texts[0], texts[2])

    def test_stops_where_it_is_told(self):
        whole = latente("generate", "model", "-p", "the", "-t", 1, "-n", 60, "--seed", 3, "--no-echo",
                        "--logit-bias", f"{END}=-inf").stdout[:-1]
        stop = whole[len(whole) // 2:][:3]
        cut = latente("generate", "model", "-p", "the", "-t", 1, "-n", 60, "--seed", 3, "--no-echo", "--stop", stop,
                      "--logit-bias", f"{END}=-inf").stdout[:-1]
        self.assertEqual(cut, whole[:whole.index(stop)])
        self.assertEqual(latente("generate", "model", "-p", "the", "-n", 0).stdout, "the\n")

    def test_replies_have_the_form_asked_for(self):
        grammar = write("date.gbnf", 'root ::= [0-9]{4} "-" ("0" [1-9] | "1" [0-2]) (" " word)?\nword ::= [a-z]{1,9}\n')
        schema = {"type": "object", "required": ["name", "age", "tags"], "additionalProperties": False,
                  "properties": {"name": {"type": "string", "maxLength": 12},
                                 "age": {"type": "integer", "minimum": 0, "maximum": 130},
                                 "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}}}
        path = write("schema.json", json.dumps(schema))
        for seed in range(6):
            how = ["-p", "the", "--no-echo", "-n", 400, "-t", 1, "--seed", seed]
            text = latente("generate", "model", *how, "--grammar", grammar).stdout[:-1]
            self.assertRegex(text, r"^\d{4}-(0[1-9]|1[0-2])( [a-z]{1,9})?\Z")
            text = latente("generate", "model", *how, "--json-schema", path).stdout
            value = json.loads(text)
            self.assertEqual(list(value), ["name", "age", "tags"])
            self.assertLessEqual(len(value["name"]), 12)
            self.assertTrue(isinstance(value["age"], int) and 0 <= value["age"] <= 130)
            self.assertTrue(set(value["tags"]) <= {"a", "b"} and len(value["tags"]) <= 3)
            self.assertEqual(latente("generate", "model", *how, "--json-schema", json.dumps(schema)).stdout, text)
        self.assertEqual(latente("generate", "model", "-p", "the", "--no-echo", "-n", 1, "--json").stdout[0], "{")

    def start(self, prompt):
        return subprocess.Popen([LATENTE, "generate", "model", "-f", prompt, "--no-echo", "-t", "1", "-n", "1000000",
                                 "--ctx-size", "1000000", "--logit-bias", f"{END}=-inf", "--stats"], cwd=HOME,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def test_an_interrupt_ends_the_reply_with_its_statistics(self):
        process = self.start(write("short.txt", "the king"))
        self.addCleanup(process.kill)
        begin = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 0)
        self.assertTrue((begin + out).endswith(b"\n"))
        self.assertRegex(err.decode(), r"decode      [1-9]\d* tokens")

    def test_an_interrupt_ends_the_reading_of_a_prompt(self):
        process = self.start(write("long.txt", "the king said unto the queen " * 30000))
        self.addCleanup(process.kill)
        wait_for(lambda: catches_interrupts(process), "it reads the prompt")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, out), (0, b"\n"))
        self.assertIn("decode      0 tokens", err.decode())


class Batch(unittest.TestCase):
    @staticmethod
    def prompts(count, seed):
        choose = random.Random(seed)
        rows = []
        for i in range(count):
            text = "the king said " * choose.randint(0, 4) + choose.choice(["unto the", "river", "a stone", ""])
            row = {"prompt": text} if choose.random() < 0.7 else {"messages": [{"role": "user", "content": text or "x"}]}
            if choose.random() < 0.5:
                row["id"] = f"name {i}"
            if choose.random() < 0.5:
                row |= {"temperature": 0.9, "seed": choose.randint(0, 99), "top_p": 0.95}
            if choose.random() < 0.5:
                row["max_tokens"] = choose.randint(1, 40)
            if choose.random() < 0.2:
                row["stop"] = choose.choice(["e", ["q", "the "]])
            rows.append(row)
        return rows

    def answers(self, source, out, *more, status=0):
        done = latente("batch", "model", "--in", source, "--out", HOME / out, "--seed", 4, "-n", 30, *more, status=status)
        return sorted(read_lines(HOME / out), key=lambda answer: answer["index"]), done

    def test_answers_are_those_of_generate_in_any_company(self):
        rows = self.prompts(24, seed=1)
        source = write_lines("prompts.jsonl", rows)
        one_by_one, _ = self.answers(source, "one.jsonl", "--parallel", 1)
        together, done = self.answers(source, "together.jsonl", "--parallel", 16)
        tight, _ = self.answers(source, "tight.jsonl", "--parallel", 16, "--ctx-size", 128, "--cache-tokens", 256)
        self.assertIn("24 of 24 answered", done.stderr)
        kept = ["index", "id", "text", "finish_reason", "prompt_tokens", "completion_tokens"]
        for i, row in enumerate(rows):
            answer = {key: together[i][key] for key in kept}
            self.assertEqual(answer, {key: one_by_one[i][key] for key in kept})
            self.assertEqual(answer, {key: tight[i][key] for key in kept})
            self.assertEqual((answer["index"], answer["id"]), (i, row.get("id", i)))
            if "messages" in row:
                continue
            how = ["-p", row["prompt"], "--no-echo", "-n", row.get("max_tokens", 30), "--seed", row.get("seed", 4 + i),
                   "-t", row.get("temperature", 0), "--top-p", row.get("top_p", 1)]
            for stop in [row["stop"]] if isinstance(row.get("stop"), str) else row.get("stop", []):
                how += ["--stop", stop]
            self.assertEqual(latente("generate", "model", *how).stdout, answer["text"] + "\n")

    def test_a_budget_of_memory_that_holds_one_sequence_is_enough(self):
        rows = self.prompts(12, seed=3)
        source = write_lines("budget.jsonl", rows)
        free, _ = self.answers(source, "free.out", "--ctx-size", 128)
        refused = latente("batch", "model", "-i", source, "-o", "none.out", "--ctx-size", 128, "--cache-memory", "1K", status=1)
        needed = re.search(r"--cache-memory: a sequence of 128 tokens needs .* \((\d+) bytes\), found 1.0 KiB", refused.stderr)
        self.assertIsNotNone(needed, refused.stderr)
        least = int(needed.group(1))
        latente("batch", "model", "-i", source, "-o", "none.out", "--ctx-size", 128, "--cache-memory", least - 1, status=1)
        self.assertFalse((HOME / "none.out").exists())  # where nothing was answered, nothing is left
        tight, _ = self.answers(source, "tight.out", "--ctx-size", 128, "--cache-memory", least)
        for answer in free + tight:
            answer.pop("cached_tokens", None)
        self.assertEqual(tight, free)

    def test_goes_on_behind_a_line_cut_short(self):
        rows = self.prompts(12, seed=2)
        source = write_lines("again.jsonl", rows)
        whole, _ = self.answers(source, "again.out")
        lines = (HOME / "again.out").read_text().splitlines(keepends=True)
        kept = "".join(lines[:5])
        write("again.out", kept + lines[5][:-9])
        again, done = self.answers(source, "again.out")
        self.assertIn("5 of 12 are answered already", done.stderr)
        self.assertTrue((HOME / "again.out").read_text().startswith(kept))
        for answer in whole + again:
            answer.pop("cached_tokens")
        self.assertEqual(again, whole)

    def test_goes_on_after_a_kill_and_after_an_interrupt(self):
        rows = [{"prompt": f"the king {i}", "max_tokens": 150} for i in range(80)]
        source = write_lines("killed.jsonl", rows)
        more = ["--parallel", 2, "--logit-bias", f"{END}=-inf"]
        whole, _ = self.answers(source, "whole.out", *more)
        out = HOME / "killed.out"
        for ending, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)):
            for _ in range(5):  # it may be done before it is hit
                out.unlink(missing_ok=True)
                process = subprocess.Popen([LATENTE, "batch", "model", "-i", source, "-o", out, "--seed", "4", "-n", "30",
                                            *map(str, more)], cwd=HOME, stderr=subprocess.PIPE, text=True)
                wait_for(lambda: process.poll() is not None or (out.exists() and out.stat().st_size), "an answer")
                process.send_signal(ending)
                err = process.communicate(timeout=PATIENCE)[1]
                if process.returncode == status:
                    break
            self.assertEqual(process.returncode, status)
            self.assertLess(len(out.read_bytes().splitlines()), len(rows))
            if ending == signal.SIGINT:
                self.assertIn("the same command goes on", err)
            again, done = self.answers(source, "killed.out", *more)
            self.assertIn("are answered already", done.stderr)
            for answer in whole + again:
                answer.pop("cached_tokens", None)
            self.assertEqual(again, whole)

    def test_what_cannot_be_answered_is_named(self):
        for line, message in (("{", "expected a JSON object"), ('{"prompt": 3}', "prompt: expected a text, found 3"),
                              ('{"prompt": "a", "color": 1}', "color: no such setting"),
                              ('{"prompt": "a", "messages": []}', "expected at least one message"),
                              ('{"id": 1}', "expected either prompt or messages"),
                              ('{"prompt": "a", "id": [1]}', "id: expected a text or a number"),
                              ('{"messages": [{"role": "user"}]}', "expected {\"role\": TEXT")):
            source = write("bad.jsonl", '{"prompt": "a"}\n\n' + line + "\n")
            done = latente("batch", "model", "-i", source, "-o", "bad.out", status=1)
            self.assertIn(f"{source}: line 3: ", done.stderr)
            self.assertIn(message, done.stderr)
            self.assertFalse((HOME / "bad.out").exists())
        rows = [{"prompt": "a", "temperature": "hot"}, {"prompt": "a", "top_p": 3}, {"prompt": "the king"},
                {"prompt": "a" * 200}, {"messages": [{"role": "wizard", "content": "a"}]}, {"prompt": "a", "max_tokens": -1}]
        answers, done = self.answers(write_lines("some.jsonl", rows), "some.out", "--ctx-size", 64, status=1)
        self.assertIn("5 could not be answered", done.stderr)
        for i, part in enumerate(["temperature: ", "top_p: ", None, "the context holds 64", "wizard", "max_tokens: "]):
            if part:
                self.assertIn(part, answers[i]["error"])
            else:
                self.assertIn("text", answers[i])

    def test_the_answers_of_others_are_left_alone(self):
        source = write_lines("mine.jsonl", [{"prompt": "a", "id": "mine"}])
        for text, message in (('{"index": 0, "id": "theirs", "text": ""}\n', "line 1: answers other prompts"),
                              ('{"index": 7, "id": "mine", "text": ""}\n', "line 1: answers other prompts"),
                              ("a letter\n", "line 1: is no answer of a batch")):
            out = write("theirs.out", text)
            self.assertIn(f"{out}: {message}", latente("batch", "model", "-i", source, "-o", out, status=1).stderr)
            self.assertEqual(out.read_text(), text)


class Terminal:
    """The program on a pseudo-terminal of its own."""

    def __init__(self, *arguments):
        self.text, self.seen = "", 0
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(HOME)
            os.execv(LATENTE, [LATENTE, *map(str, arguments)])

    def type(self, text):
        os.write(self.master, text.encode())

    def read(self):
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # the other end is closed
            piece = b""
        self.text += piece.decode(errors="replace")
        return bool(piece)

    def expect(self, pattern):
        """Waits for the pattern behind what was expected before."""
        end = time.monotonic() + PATIENCE
        while not (found := re.compile(pattern).search(self.text, self.seen)):
            ready = select.select([self.master], [], [], max(0, end - time.monotonic()))[0]
            if not ready or not self.read():
                raise AssertionError(f"expected {pattern!r} in {self.text[self.seen:]!r}")
        self.seen = found.end()
        return found

    def leave(self):
        """Its exit status, once it has ended by itself."""
        while self.read():
            pass
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


class Chat(unittest.TestCase):
    TALK = ["-n", 12, "-t", 0, "--logit-bias", f"{END}=-inf"]

    def terminal(self, *arguments):
        terminal = Terminal("chat", "model", *arguments)
        self.addCleanup(terminal.close)
        return terminal

    def test_answers_line_by_line_on_a_pipe(self):
        done = latente("chat", "model", *self.TALK, "--system", "be brief", "--stats",
                       stdin="hello\n\n/stats\n/nonsense\nand now\n/clear\nhello\n/quit\nnever read\n")
        self.assertEqual(done.stderr.count("prompt      "), 4)  # three replies and /stats
        self.assertIn("no command is named /nonsense", done.stderr)
        self.assertIn("the conversation is empty", done.stderr)
        self.assertEqual(done.stderr.count("(--max-tokens ended the reply)"), 3)
        replies = done.stdout.split("\n")
        self.assertEqual(replies[0], replies[2])
        # The second turn finds the first in the cache.
        reused = [int(n) for n in re.findall(r"\((\d+) from the cache\)", done.stderr)]
        self.assertEqual(reused[0], 0)
        self.assertGreater(reused[2], 12)
        # What batch makes of the same messages.
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": replies[0]}, {"role": "user", "content": "and now"}]
        source = write_lines("turns.jsonl", [{"messages": messages[:2]}, {"messages": messages}])
        latente("batch", "model", "-i", source, "-o", "turns.out", *self.TALK)
        self.assertEqual([a["text"] for a in sorted(read_lines(HOME / "turns.out"), key=lambda a: a["index"])], replies[:2])

    def test_talks_on_a_terminal(self):
        terminal = self.terminal(*self.TALK)
        terminal.expect(r"/help for commands")
        terminal.expect(r"> ")
        terminal.type("hello\n")
        terminal.expect(r"hello\r\n")
        terminal.expect(r"\S.*\r\n\(--max-tokens ended the reply\)\r\n\r\n> ")
        terminal.type("/help\n")
        terminal.expect(r"/clear .*\r\n/save .*\r\n/stats .*\r\n/quit .*\r\n\r\n> ")
        terminal.type("\x03")
        terminal.expect(r"Ctrl-D leaves\r?\n?.*> ")
        terminal.type("/stats\n")
        terminal.expect(r"decode      12 tokens.*(\r\n.*)*> ")
        terminal.type("\x04")
        self.assertEqual(terminal.leave(), 0)

    def test_an_interrupt_ends_the_reply_alone(self):
        terminal = self.terminal("-n", 1000000, "--ctx-size", 1000000, "-t", 1, "--logit-bias", f"{END}=-inf")
        terminal.expect(r"> ")
        for _ in range(2):
            terminal.type("hello\n")
            terminal.expect(r"hello\r\n")
            terminal.expect(r"\S")
            terminal.type("\x03")
            terminal.expect(r"\r\n\r\n> ")
        terminal.type("/stats\n")
        terminal.expect(r"decode      [1-9]\d* tokens.*(\r\n.*)*> ")
        terminal.type("/quit\n")
        self.assertEqual(terminal.leave(), 0)

    def test_errors_leave_the_conversation_as_it_was(self):
        terminal = self.terminal("-n", 4, "--ctx-size", 64, "-t", 0, "--logit-bias", f"{END}=-inf")
        terminal.expect(r"> ")
        terminal.type("x" * 300 + "\n")
        terminal.expect(r"latente: the prompt has \d+ tokens, the context holds 64 \(the line is left out.*\r\n\r\n> ")
        terminal.type("hello\n")
        terminal.expect(r"hello\r\n.*\S.*\r\n\(--max-tokens.*\r\n\r\n> ")
        terminal.type("\x04")
        self.assertEqual(terminal.leave(), 0)

    def test_a_session_goes_on_where_it_ended(self):
        how = [*self.TALK, "--stats", "--session", "talk.session"]
        whole = latente("chat", "model", *self.TALK, stdin="hello\nand now\n").stdout
        first = latente("chat", "model", *how, stdin="hello\n")
        second = latente("chat", "model", *how, stdin="and now\n")
        self.assertEqual(first.stdout + second.stdout, whole)
        kept = int(re.search(r"talk.session: the conversation, with (\d+) tokens of cache", first.stderr).group(1))
        self.assertGreater(kept, 12)
        self.assertIn(f"talk.session: 2 messages, {kept} tokens of cache", second.stderr)
        # As far as the text of the reply is cut into the tokens that were written.
        prompt = int(re.search(r"prompt      (\d+) tokens", first.stderr).group(1))
        self.assertGreaterEqual(int(re.search(r"\((\d+) from the cache\)", second.stderr).group(1)), prompt)
        self.assertIn("talk.session: 4 messages", latente("chat", "model", *how).stderr)

    def test_a_damaged_session_is_refused_and_kept(self):
        latente("chat", "model", *self.TALK, "--session", "whole.session", stdin="hello\n")
        whole = (HOME / "whole.session").read_bytes()
        header = int.from_bytes(whole[:8], "little")
        for damaged in (b"", whole[:50], whole[:-7], b"\0" * len(whole), whole.replace(b"role", b"rule", 1),
                        whole[:8] + whole[8:8 + header].replace(b'"positions"', b'"positionz"') + whole[8 + header:]):
            path = HOME / "damaged.session"
            path.write_bytes(damaged)
            done = latente("chat", "model", *self.TALK, "--session", path, stdin="hello\n", status=1)
            self.assertIn("damaged.session: ", done.stderr)
            self.assertEqual(path.read_bytes(), damaged)
        done = latente("chat", "model", "--kv-cache-dtype", "bf16", "--session", "whole.session", status=1)
        self.assertIn("whole.session: is the cache of another model", done.stderr)
        self.assertIn("nowhere/new.session: ", latente("chat", "model", "--session", "nowhere/new.session", status=1).stderr)


class Files(unittest.TestCase):
    """convert, perplexity, bench, inspect, parity, tokenizer."""

    def test_converted_models_run_as_if_quantised_while_loading(self):
        for name, weights, more in (("wide", "int8", []),
                                    ("narrow", "int4", ["--calibrate", "text.txt", "--calibration-tokens", 512]),
                                    ("parts", "int4", ["--group", 32, "--shard-size", "100KB"])):
            out = HOME / name
            done = latente("convert", "model", out, "--weights", weights, *more)
            self.assertRegex(done.stdout, rf"^{out}: .* in \d+ files?, \d+\.\d\d bits a weight")
            how = ["-p", "the king", "-t", 0, "-n", 12]
            text = latente("generate", out, *how).stdout
            if "--calibrate" not in more:
                group = ["--group", 32] if "--group" in more else []
                self.assertEqual(text, latente("generate", "model", *how, "--dtype", weights, *group).stdout)
            before = {path: path.read_bytes() for path in out.iterdir()}
            self.assertIn(f"{out}: expected a new or empty directory",
                          latente("convert", "model", out, "--weights", weights, status=1).stderr)
            self.assertEqual({path: path.read_bytes() for path in out.iterdir()}, before)
        self.assertIn("--shard-size: expected a size",
                      latente("convert", "model", "new", "--weights", "int8", "--shard-size", "5X", status=1).stderr)

    def test_perplexity_agrees_with_itself(self):
        def measured(model, *more):
            return json.loads(latente("perplexity", model, "text.txt", "--json", "--max-tokens", 600, *more).stdout)
        stored, narrow = measured("model"), measured("model", "--weights", "int8")
        self.assertEqual(stored["tokens"], 600)
        self.assertAlmostEqual(stored["perplexity"], math.exp(stored["nll"]), delta=1e-6 * stored["perplexity"])
        self.assertAlmostEqual(stored["bits_per_byte"], stored["nll"] * stored["tokens"] / stored["bytes"] / math.log(2),
                               delta=1e-6)
        self.assertAlmostEqual(narrow["nll"], stored["nll"], delta=0.05)
        # Other pieces of context, the same text.
        short = measured("model", "--context", 64, "--stride", 16)
        self.assertEqual((short["tokens"], short["bytes"]), (stored["tokens"], stored["bytes"]))
        lines = latente("perplexity", "model", "text.txt", "--max-tokens", 600).stdout
        self.assertIn(f"perplexity      {stored['perplexity']:.4f} ", lines)

    def test_bench_measures_what_it_is_asked_for(self):
        rows = [json.loads(line) for line in
                latente("bench", "model", "--prompt", 16, "--gen", 4, "--depth", "0,32", "--repeat", 1, "--threads", 1,
                        "--json").stdout.splitlines()]
        self.assertEqual([(row["kind"], row["tokens"], row["depth"], row["threads"]) for row in rows],
                         [("prefill", 16, 0, 1), ("decode", 4, 0, 1), ("prefill", 16, 32, 1), ("decode", 4, 32, 1)])
        self.assertTrue(all(row["tok_s"] > 0 and row["bound_share"] > 0 for row in rows))
        text = latente("bench", "config.json", "--prompt", 0, "--gen", 2, "--repeat", 1, "--weights", "int4").stdout
        self.assertRegex(text, r"(?m)^decode +2 +0 +\d+\.\d +0\.0 % +(>100|\d\d?|100) %$")
        self.assertNotIn("prefill", text)

    def test_inspect_parity_and_tokenizer_run(self):
        self.assertIn("2 layers of 64, vocabulary 320", latente("inspect", "model").stdout)
        model = REFERENCE / "v3"
        self.assertIn(" 0 over tolerance", latente("parity", model, model / "reference.safetensors").stdout)
        latente("parity", REFERENCE / "v3-tied", model / "reference.safetensors", status=1)
        text = "the king said:\n\t‹unto› 7 stones"
        ids = latente("tokenizer", "encode", "model", text).stdout
        self.assertEqual(latente("tokenizer", "decode", "model", "--skip-special", stdin=ids).stdout, text)


class Errors(unittest.TestCase):
    def test_bad_arguments_and_missing_files_are_named(self):
        empty = HOME / "empty"
        empty.mkdir()
        no_template = HOME / "no-template"
        shutil.copytree(HOME / "model", no_template)
        config = json.loads((no_template / "tokenizer_config.json").read_text())
        config.pop("chat_template")
        (no_template / "tokenizer_config.json").write_text(json.dumps(config))
        cut = HOME / "cut"
        shutil.copytree(HOME / "model", cut)
        weights = (cut / "model.safetensors").read_bytes()
        (cut / "model.safetensors").write_bytes(weights[:len(weights) // 2])
        gguf = write("broken.gguf", "GGUF" + "x" * 100)
        generate = ["generate", "model", "-p", "x"]
        for arguments, message in (
                ([], "subcommand"),
                (["nonsense"], "no command is named nonsense"),
                (["generate"], "model is required"),
                (["generate", "model", "--nonsense"], "--nonsense"),
                (["generate", "nowhere", "-p", "x"], "nowhere"),
                (["generate", empty, "-p", "x"], f"{empty}: "),
                (["generate", "text.txt", "-p", "x"], "text.txt: "),
                (["generate", "config.json", "-p", "x"], "config.json: "),
                (["generate", gguf, "-p", "x"], f"{gguf}: "),
                (["generate", cut, "-p", "x"], f"{cut}/model.safetensors: "),
                (["generate", "model", "-f", "nowhere.txt"], "nowhere.txt: "),
                (["generate", "model", "-f", empty], f"{empty}: expected a file"),
                ([*generate, "--threads", -1], "--threads: "),
                ([*generate, "--threads", 100000], "--threads: "),
                ([*generate, "-n", -1], "--max-tokens: "),
                ([*generate, "--ctx-size", -1], "--ctx-size: "),
                ([*generate, "--ctx-size", "many"], "--ctx-size: "),
                ([*generate, "--cache-memory", "lots"], "--cache-memory: expected a size"),
                ([*generate, "--cache-memory", "0"], "--cache-memory: "),
                ([*generate, "--memory", "5X"], "--memory: expected a size"),
                ([*generate, "--draft", 8], "--draft: "),
                ([*generate, "-t", -1], "temperature: "),
                ([*generate, "--top-p", 2], "top_p: "),
                ([*generate, "--seed", -1], "--seed: "),
                ([*generate, "--logit-bias", "9999=1"], "--logit-bias: token 9999"),
                ([*generate, "--logit-bias", "5"], "--logit-bias: "),
                ([*generate, "--kv-cache-dtype", "q4"], "--kv-cache-dtype: "),
                ([*generate, "--dtype", "q4"], "q4"),
                ([*generate, "--grammar", "nowhere.gbnf"], "nowhere.gbnf"),
                ([*generate, "--grammar", "text.txt"], "text.txt:1:"),
                ([*generate, "--json-schema", "nowhere.json"], "nowhere.json: "),
                ([*generate, "--json-schema", '{"type": "thing"}'], "--json-schema#/type: "),
                ([*generate, "--json", "--grammar", "text.txt"], "--grammar excludes --json"),
                (["chat", no_template], f"{no_template}: has no chat template (tokenizer_config.json"),
                (["chat", REFERENCE / "gguf/v3-bf16.gguf"], "v3-bf16.gguf: "),
                (["batch", "model"], "--in is required"),
                (["batch", "model", "-i", "nowhere.jsonl", "-o", "x.out"], "nowhere.jsonl: "),
                (["batch", "model", "-i", "train.toml", "-o", "x.out"], "train.toml: line 2: "),
                (["batch", "model", "-i", write("none.jsonl", "\n"), "-o", "x.out"], "none.jsonl: has no lines"),
                (["batch", "model", "-i", write("a.jsonl", '{"prompt": "a"}'), "-o", "nowhere/x.out"], "nowhere/x.out: "),
                (["batch", "model", "-i", "a.jsonl", "-o", empty], f"{empty}: "),
                (["batch", "model", "-i", "a.jsonl", "-o", "-"], "--out: "),
                (["batch", "model", "-i", "a.jsonl", "-o", "x.out", "--parallel", 0], "--parallel: "),
                (["batch", "model", "-i", "a.jsonl", "-o", "x.out", "--cache-tokens", -1], "--cache-tokens: "),
                (["batch", "model", "-i", "a.jsonl", "-o", "x.out", "--cache-tokens", 9, "--cache-memory", "1G"], "excludes"),
                (["convert", "model", "x"], "--weights is required"),
                (["convert", "config.json", "x", "--weights", "int8"], "config.json: "),
                (["convert", "model", "text.txt", "--weights", "int8"], "text.txt: "),
                (["convert", "model", "x", "--weights", "int8", "--calibrate", "nowhere.txt"], "nowhere.txt"),
                (["perplexity", "model", "nowhere.txt"], "nowhere.txt"),
                (["perplexity", "model", write("none.txt", "")], "none.txt: expected a text"),
                (["perplexity", "model", "text.txt", "--context", 8, "--stride", 9], "stride"),
                (["bench", "nowhere"], "nowhere"),
                (["bench", "text.txt"], "text.txt: "),
                (["bench", empty], f"{empty}: "),
                (["bench", "model", "--gen", -1], "--gen: "),
                (["inspect", "text.txt"], "text.txt: "),
                (["parity", "model", "text.txt"], "text.txt: "),
                (["tokenizer", "train", "nowhere.txt", "-o", "x"], "nowhere.txt"),
                (["tokenizer", "encode", empty, "x"], f"{empty}/tokenizer.json: "),
                (["tokenizer", "decode", "model", "9999"], "9999"),
                (["train", "nowhere.toml"], "nowhere.toml"),
                (["train", "text.txt"], "text.txt"),
                (["train", "train.toml", "--set", "steps=-1"], "steps"),
                (["train", "train.toml", "--set", "nonsense=1"], "nonsense")):
            with self.subTest(arguments=arguments):
                done = latente(*arguments, status=1)
                self.assertIn(message, done.stderr)
                self.assertTrue(done.stderr.startswith("latente: "), done.stderr)


if __name__ == "__main__":
    LATENTE, REFERENCE = os.path.abspath(sys.argv[1]), pathlib.Path(sys.argv[2]).absolute()
    unittest.main(argv=sys.argv[:1] + sys.argv[3:])
